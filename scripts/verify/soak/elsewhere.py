"""A copy of the run goes on: on other devices, and with a weight that is not finite."""

from .life import EndedError
from .scene import Scene
from .trainer import MESHES, resumed_step, steps_trained
from .verdicts import CORRUPTED, LOSSES, MESSAGE, worst_relative_difference

TOLERANCE = 1e-5
STEPS = 6  # that are compared
LAYERS = 2  # of configs/tiny.py
SKIPPED = 4  # updates in a row until the run stops


def other_mesh(scene: Scene) -> None:
    """Another mesh and another layout: the same losses but for the order of sums."""
    chain, outcome = scene.chain, scene.outcome
    chain.until(chain.folder.newest, "write a checkpoint")
    scene.train_a_while(0, 5)
    flags = scene.rng.choice(MESHES)
    with scene.frozen():
        copy = chain.copy(scene.spare)
        outcome.step, newest = copy.steps_done(), copy.newest()
        with scene.started(copy.path, flags=flags) as life:
            life.until(lambda: steps_trained(life), "go on elsewhere", chain.deadline)
            life.until(lambda: copy.steps_done() >= newest + STEPS, "train elsewhere", chain.deadline)
    resumed = resumed_step(life)
    outcome.require(resumed == newest, CORRUPTED, f"went on from {resumed}, checkpoint {newest} was the newest")
    worst = worst_relative_difference(copy.lines(), chain.reference, after=resumed)
    where = " ".join(flag.rpartition(".")[2] for flag in flags)
    outcome.notes.append(f"{where}: losses differ by {worst:.1e}")
    outcome.require(worst <= TOLERANCE, LOSSES, f"{where}: losses differ by {worst:.1e}, allowed {TOLERANCE:g}")


def not_finite(scene: Scene) -> None:
    """A weight of the newest checkpoint is infinite: the run stops and says in which step, batch and layer."""
    chain, outcome = scene.chain, scene.outcome
    chain.until(chain.folder.newest, "write a checkpoint")
    scene.train_a_while(0, 5)
    with scene.frozen():
        copy = chain.copy(scene.spare)
        outcome.step = copy.steps_done()
        layer, newest = scene.rng.randrange(LAYERS), copy.newest()
        poisoning = chain.trainer.start_poisoning(copy.path, layer)
        if any(poisoning.codes("write an infinite weight", chain.deadline)):
            raise EndedError(f"no infinite weight was written: {poisoning.children[0].last_words}")
        with scene.started(copy.path, flags=[f"--config.optimizer.max_skipped_updates={SKIPPED}"]) as life:
            codes = life.codes("stop because nothing is finite", chain.deadline)
    scene.require_exit(life, codes, 1)
    scene.require_one_line(life.stderr, f"step {newest + SKIPPED}", "batch", f"layer {layer}")
    skipped = sum(line.get("skipped", 0) for line in copy.lines() if line["step"] > newest)
    outcome.require(skipped == SKIPPED, MESSAGE, f"metrics.jsonl counts {skipped} skipped updates, not {SKIPPED}")
    outcome.notes.append(f"layer {layer}: ended with {codes[0]}")
