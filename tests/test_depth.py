"""How far it is from train.py to a tile: our own functions on the Python stack where a tile of q and k is computed."""

import importlib
import pathlib
import sys
import traceback

import jax.numpy as jnp
import pytest

from ring_attention.commands.console import COMMANDS
from ring_attention.commands.program import run

ROOT = pathlib.Path(__file__).parents[1]
KERNEL = "ring_attention/attention/kernels/xla.py"
MOST_FUNCTIONS, MOST_LINES = 14, 2600
FLAGS = "--config.seq_len=64 --config.model.num_layers=1"


class Seen(BaseException):  # of a kind that no handler takes for an error of the training
    """Ends a training whose first step has been traced as far as the gradients."""


def _frames():
    """(file, function) of our own frames, outermost first, as Python names it: closures have `<locals>` in theirs."""
    frames = []
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        path = pathlib.Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests"):
            frames.append((path.relative_to(ROOT).as_posix(), frame.f_code.co_qualname))
    return frames[::-1]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """The deepest stack of a forward pass that computes a product of q and k, in one training step of train.py."""
    stacks = []

    def dot(*args, **kwargs):
        frames = _frames()
        if frames[-1][0] == KERNEL:
            if frames[-1][1].startswith("_gradients"):
                raise Seen
            stacks.append(frames)
        return real(*args, **kwargs)

    run_dir = f"--config.run_dir={tmp_path_factory.mktemp('run')}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        real = jnp.dot
        patch.setattr(jnp, "dot", dot)
        main = importlib.import_module(COMMANDS["train"].module).main
        with pytest.raises(Seen):
            run("train.py", main, ["--config=configs/tiny.py", run_dir, *FLAGS.split()])
    return max(stacks, key=len)


def _named(stack):
    """Functions of modules and methods on the stack; what is nested in one is a part of it."""
    return list(dict.fromkeys(frame for frame in stack if "<locals>" not in frame[1]))


def test_train_reaches_a_tile_in_few_functions_and_lines(stack):
    functions, files = _named(stack), sorted({path for path, _ in stack})
    listed = "\n".join(f"{number:2} {path}: {name}" for number, (path, name) in enumerate(functions, 1))
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in files}
    print(f"\n{listed}\n{len(stack)} frames; {sum(lines.values())} lines in {len(files)} files")
    assert len(functions) <= MOST_FUNCTIONS, listed
    assert sum(lines.values()) <= MOST_LINES, lines


def test_stack_begins_at_train_and_ends_in_the_kernel(stack):
    assert stack[0] == ("ring_attention/commands/program.py", "run")
    assert ("ring_attention/commands/train.py", "main") in stack
    assert ("ring_attention/parallel/ring_pass.py", "RingPass.run") in stack  # a block that has travelled
    assert stack[-1][0] == KERNEL
    assert len(stack) > len(_named(stack))
