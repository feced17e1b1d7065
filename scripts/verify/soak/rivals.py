"""Faults of several processes: a second run on the same folder, and peers of one run that are lost."""

import signal
import time
from collections.abc import Callable

from .life import Child
from .scene import NEAR_THE_END, PEERS_SECONDS, Scene
from .verdicts import EXIT, MESSAGE


def second_run(scene: Scene) -> None:
    """The same command while the run trains: refused, and the run goes on."""
    chain = scene.chain
    scene.train_a_while()
    with scene.started(chain.folder.path) as second:
        while second.children[0].code is None and chain.steps_left > 2 * NEAR_THE_END:
            time.sleep(0.01)
        with scene.frozen():  # the folder must stay in use until the other has looked at it
            codes = second.codes("be refused", chain.deadline)
    scene.require_exit(second, codes, 2)
    scene.require_one_line(second.stderr, str(chain.folder.path))
    scene.outcome.step = chain.folder.steps_done()
    scene.outcome.notes.append(f"the second ended with {codes[0]}")
    chain.train_on(2)
    scene.outcome.require_lines(chain.folder.lines(), chain.reference)


def lose_process(scene: Scene) -> None:
    """SIGKILL to one of the processes of a run: the others stop and say which."""
    _lose(scene, Child.kill, "killed")


def freeze_process(scene: Scene) -> None:
    """SIGSTOP to one of the processes of a run, as if its machine had hung: the others stop and say which."""
    _lose(scene, lambda child: child.signal(signal.SIGSTOP), "frozen")


def _lose(scene: Scene, strike: Callable[[Child], None], how: str) -> None:
    """Strike one process, wait for the end of all others, see that it was the right one, and restart."""
    chain, outcome = scene.chain, scene.outcome
    scene.train_a_while(1, 6)
    victim = scene.rng.randrange(len(chain.life.children))
    lost = chain.life.children[victim]
    strike(lost)
    others = [child for child in chain.life.children if child is not lost]
    began = time.monotonic()
    codes = chain.life.codes(f"end after process {victim} was {how}", PEERS_SECONDS, but=[lost])
    outcome.notes.append(f"process {victim} {how}, the others ended in {time.monotonic() - began:.1f} s")
    chain.kill(outcome)
    outcome.require(set(codes) == {1}, EXIT, f"the others ended with {codes}, not 1: {others[0].last_words}")
    for child in others:
        named = any(f"process {victim}" in line for line in child.stderr.splitlines() if "error" in line)
        outcome.require(named, MESSAGE, f"no line names process {victim}: {child.last_words}")
    chain.restart(outcome)


def terminate_process(scene: Scene) -> None:
    """SIGTERM to one of the processes of a run: all write a checkpoint and end."""
    scene.train_a_while(1, 6)
    chosen = scene.rng.randrange(len(scene.chain.life.children))
    scene.outcome.notes.append(f"SIGTERM to process {chosen}")
    scene.terminate_and_restart([scene.chain.life.children[chosen]])
