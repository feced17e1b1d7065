"""Faults of several processes: a second run on the same folder, and peers of one run that are lost."""

import signal
import time

from .scene import NEAR_THE_END, PEERS_SECONDS, SIGTERM_SECONDS, Scene
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
    scene.train_a_while(1, 6)
    victim = scene.rng.randrange(len(scene.chain.life.children))
    scene.chain.life.children[victim].kill()
    _see_the_others_stop(scene, victim, "killed")


def freeze_process(scene: Scene) -> None:
    """SIGSTOP to one of the processes of a run, as if its machine had hung: the others stop and say which."""
    scene.train_a_while(1, 6)
    victim = scene.rng.randrange(len(scene.chain.life.children))
    scene.chain.life.children[victim].signal(signal.SIGSTOP)
    _see_the_others_stop(scene, victim, "frozen")


def _see_the_others_stop(scene: Scene, victim: int, how: str) -> None:
    """Wait for the end of all processes but one, see that it was the right one, and restart."""
    chain, outcome = scene.chain, scene.outcome
    lost = chain.life.children[victim]
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
    chain = scene.chain
    scene.train_a_while(1, 6)
    chosen = scene.rng.randrange(len(chain.life.children))
    began = time.monotonic()
    chain.life.children[chosen].signal(signal.SIGTERM)
    codes = chain.life.codes(f"end after SIGTERM to process {chosen}", SIGTERM_SECONDS)
    scene.outcome.notes.append(f"SIGTERM to process {chosen}, all ended in {time.monotonic() - began:.1f} s")
    chain.take_in_death(scene.outcome)
    scene.require_exit(chain.life, codes, 128 + signal.SIGTERM)
    scene.outcome.bound = 0
    chain.restart(scene.outcome)
