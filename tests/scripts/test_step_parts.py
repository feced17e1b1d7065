"""Each operation of a step belongs to a part, and the parts sum to the step."""

import dataclasses

import pytest

from ring_attention.training.config import DataConfig, MeshConfig, TrainConfig
from ring_attention.training.flags import load_config
from scripts.benchmarks.step_parts import (
    BACKWARD,
    EXCHANGE,
    FORWARD,
    OTHER,
    PARTS,
    REST,
    SCOPES,
    parts_of_program,
)
from scripts.benchmarks.trainers import OurTrainer, write_text

PROGRAM = """
  %dot.1 = f32[4,4]{1,0} dot(%a, %b), metadata={op_name="jit(step)/shard_map/jvp(projections)/jvp(attention)/dot"}
  %dot.2 = f32[4,4]{1,0} dot(%a, %b), metadata={op_name="jit(step)/transpose(jvp(projections))/attention/dot"}
  %dot.3 = f32[4,4]{1,0} dot(%a, %b), metadata={op_name="jit(step)/jvp(projections)/dot_general"}
  ROOT %fusion = (f32[4]{0}, f32[4]{0}) fusion(%a), metadata={op_name="jit(step)/optimizer/mul"}
  %collective-permute.7 = f32[4]{0} collective-permute(%a), metadata={op_name="jit(step)/jvp(attention)/ppermute"}
  %all-reduce-start = f32[4]{0} all-reduce-start(%a), metadata={op_name="jit(step)/loss/psum"}
  %while.2 = (f32[4]{0}) while(%t), metadata={op_name="jit(step)/jvp(attention)/while"}
  %call.9 = f32[4]{0} call(%a), to_apply=%parallel_fusion
  %copy.3 = f32[4]{0} copy(%a)
"""


def test_parts_of_program_goes_by_the_innermost_scope():
    assert parts_of_program(PROGRAM) == {
        "dot.1": FORWARD,
        "dot.2": BACKWARD,
        "dot.3": SCOPES["projections"],
        "fusion": SCOPES["optimizer"],
        "collective-permute.7": EXCHANGE,
        "all-reduce-start": EXCHANGE,
        "copy.3": OTHER,
    }


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """configs/tiny.py on a ring of two, with text that fills its rows."""
    folder = tmp_path_factory.mktemp("texts")
    write_text(folder, 256, 8)
    config: TrainConfig = load_config("configs/tiny.py")
    data = DataConfig(paths=f"{folder}/*.txt", holdout_fraction=0.25)
    return OurTrainer(dataclasses.replace(config, mesh=MeshConfig(sp=2), batch_size=1, data=data))


@pytest.mark.slow
def test_measure_parts_sums_to_the_step(trainer):
    first = trainer.run()
    parts = trainer.parts()
    assert tuple(parts) == PARTS
    assert all(parts[part] > 0 for part in PARTS if part != REST)
    assert parts[REST] < sum(parts.values())
    assert parts[OTHER] < 0.5 * (sum(parts.values()) - parts[REST])
    for _ in range(4):
        last = trainer.run()
    assert 0 < last < first  # the step that was profiled and these are steps of training
