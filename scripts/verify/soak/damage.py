"""Faults of the disk: the newest checkpoint is not what was written."""

import os
import random
from collections.abc import Callable
from pathlib import Path

from .scene import Scene
from .verdicts import CORRUPTED, MESSAGE

HARMLESS = "a file that is not read"
"""Orbax leaves files that a restore has no need of; damage to them is not noticed, and the losses must be right."""

MORE_STEPS = 4


def flip(scene: Scene) -> None:
    """SIGKILL, and some bytes of a file of the newest checkpoint change."""
    _damage(scene, _flip)


def truncate(scene: Scene) -> None:
    """SIGKILL, and a file of the newest checkpoint ends early."""
    _damage(scene, _truncate)


def _damage(scene: Scene, spoil: Callable[[Path, random.Random], str]) -> None:
    chain = scene.chain
    chain.until(lambda: len(chain.folder.checkpoints()) > 1, "write two checkpoints")
    scene.train_a_while(0, 5)
    chain.kill(scene.outcome)
    *_, good, newest = chain.folder.checkpoints()
    path = chain.folder.checkpoints_path / str(newest)
    file = scene.rng.choice(sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size))
    scene.outcome.notes.append(f"{newest}/{file.relative_to(path)} {spoil(file, scene.rng)}")
    scene.outcome.bound += newest - good
    if chain.restart(scene.outcome, allowed=[good, newest]) == newest:
        chain.train_on(MORE_STEPS)  # what was spoilt in the optimizer is in a later loss
        scene.outcome.require_lines(chain.folder.lines(), chain.reference)
        scene.outcome.notes.append(HARMLESS)
        return
    scene.outcome.require(str(path) in chain.life.stderr, MESSAGE, f"stderr does not name {path}")
    aside = list((chain.folder.path / "damaged").glob(f"{newest}-*"))
    scene.outcome.require(bool(aside), CORRUPTED, f"checkpoint {newest} was not put aside into damaged/")


def _flip(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    places = rng.sample(range(len(content)), min(len(content), rng.randint(1, 4)))
    for place in places:
        content[place] ^= rng.randint(1, 255)
    file.write_bytes(content)
    return f"with {len(places)} of {len(content)} bytes changed"


def _truncate(file: Path, rng: random.Random) -> str:
    size, left = file.stat().st_size, rng.randrange(file.stat().st_size)
    os.truncate(file, left)
    return f"cut from {size} to {left} bytes"
