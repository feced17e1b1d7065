"""PyTorch's loop in the benchmark trains the same model on the same tokens as ours: their losses are the same."""

import dataclasses

import pytest

from ring_attention.models.rope import RopeConfig
from ring_attention.training.config import DataConfig, MeshConfig
from ring_attention.training.flags import load_config
from scripts.benchmarks.trainers import ELSE, PRODUCTS, OurTrainer, TorchTrainer, write_text

pytest.importorskip("torch")
pytestmark = pytest.mark.interop
STEPS = 5


@pytest.fixture
def config(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "weights").mkdir()
    write_text(tmp_path / "texts", 256, 8)
    data = DataConfig(paths=f"{tmp_path}/texts/*.txt", holdout_fraction=0.25)
    return dataclasses.replace(load_config("configs/tiny.py"), mesh=MeshConfig(sp=2), batch_size=1, data=data)


def test_losses_are_those_of_pytorch_step_for_step(config, tmp_path):
    ours = OurTrainer(config)
    ours.write_weights(tmp_path / "weights")
    want = [ours.run() for _ in range(STEPS)]
    theirs = TorchTrainer(config, tmp_path / "weights", compiled=False)
    assert [theirs.run() for _ in range(STEPS)] == pytest.approx(want, rel=1e-4)
    assert abs(want[-1] - want[0]) > 0.01 * want[0], "they learn"
    turned = dataclasses.replace(config, model=dataclasses.replace(config.model, rope=RopeConfig(theta=10.0)))
    control = OurTrainer(turned)
    assert [control.run() for _ in range(STEPS)] != pytest.approx(want, rel=1e-4)


def test_the_parts_of_a_step_of_pytorch_sum_to_it(config, tmp_path):
    OurTrainer(config).write_weights(tmp_path / "weights")
    theirs = TorchTrainer(config, tmp_path / "weights", compiled=False)
    theirs.run()
    parts = theirs.parts()
    assert len(parts) == 5
    assert all(seconds > 0 for part, seconds in parts.items() if part != ELSE)
    assert parts[PRODUCTS] < sum(parts.values())
