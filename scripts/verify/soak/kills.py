"""Faults of one process: killed in every phase of its life, or asked to end."""

import signal
import time

from .life import EndedError
from .scene import Scene
from .trainer import steps_trained
from .verdicts import LOST

MORE_TRIES = 50


def kill(scene: Scene) -> None:
    """SIGKILL at a random moment of training."""
    scene.train_a_while()
    scene.chain.kill(scene.outcome)
    scene.chain.restart(scene.outcome)


def kill_saving(scene: Scene) -> None:
    """SIGKILL while a checkpoint lies half written."""
    chain = scene.chain
    scene.train_a_while(0, 6)
    for _ in range(MORE_TRIES):
        chain.until(chain.folder.unfinished, "begin a checkpoint")
        time.sleep(scene.rng.uniform(0, 0.15))
        chain.life.freeze()
        if half := chain.folder.unfinished():
            break
        chain.life.thaw()
    else:
        raise EndedError("no checkpoint was ever seen half written")
    chain.kill(scene.outcome)
    files = sum(path.is_file() for path in (chain.folder.checkpoints_path / half[0]).rglob("*"))
    scene.outcome.notes.append(f"{half[0].partition('.')[0]} half written, {files} files")
    chain.restart(scene.outcome)


def kill_saved(scene: Scene) -> None:
    """SIGKILL in the instant in which a checkpoint is complete, while the oldest is being removed."""
    chain = scene.chain
    scene.train_a_while(0, 6)
    newest = chain.folder.newest()
    chain.until(lambda: chain.folder.newest() > newest, "complete a checkpoint")
    chain.kill(scene.outcome)
    scene.outcome.notes.append(f"{chain.folder.newest()} just written")
    chain.restart(scene.outcome)


def kill_starting(scene: Scene) -> None:
    """SIGKILL, and another one while the run starts again."""
    seconds = _kill_and_launch(scene)
    scene.chain.kill(scene.outcome)
    scene.outcome.notes.append(f"again {seconds:.1f} s after the start")
    scene.chain.restart(scene.outcome)


def terminate(scene: Scene) -> None:
    """SIGTERM during training: a checkpoint of the step it has reached."""
    scene.train_a_while()
    scene.terminate_and_restart(scene.chain.life.children)


def terminate_starting(scene: Scene) -> None:
    """SIGKILL, and SIGTERM while the run starts again: before its first step there is nothing to save."""
    chain = scene.chain
    seconds = _kill_and_launch(scene)
    codes = scene.terminate(chain.life.children)
    scene.outcome.notes[-1] += f", {seconds:.1f} s after the start"
    trained = steps_trained(chain.life) > 1  # in its first one it may not have been ready for the signal
    scene.require_exit(chain.life, codes, 128 + signal.SIGTERM, *([] if trained else [-signal.SIGTERM]))
    if trained:
        saved = f"step {chain.folder.steps_done()} was done, {chain.folder.newest()} is the newest checkpoint"
        scene.outcome.require(chain.folder.newest() == chain.folder.steps_done(), LOST, saved)
    chain.restart(scene.outcome)


def _kill_and_launch(scene: Scene) -> float:
    """SIGKILL during training, launch again and wait for a random part of a start; returns how many seconds."""
    scene.train_a_while()
    scene.chain.kill(scene.outcome)
    seconds = scene.rng.uniform(0, scene.chain.startup)
    scene.chain.launch()
    time.sleep(seconds)
    return seconds
