"""A model that the memory cannot hold is refused in a line, before anything of it is allocated."""

import dataclasses
import types

import jax
import pytest

from ring_attention.checks import ConfigError
from ring_attention.models.config import ModelConfig
from ring_attention.parallel.mesh import make_mesh
from ring_attention.training import validate
from ring_attention.training.config import TrainConfig
from ring_attention.training.state import sharded_abstract_state
from ring_attention.training.validate import available_on_host, kept_bytes, require_memory, state_bytes

SMALL = ModelConfig(vocab_size=264, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64)
LARGE = ModelConfig(
    vocab_size=32000, num_layers=30, model_dim=4096, num_heads=32, num_kv_heads=32, head_dim=128, ffn_dim=11008
)
CONFIG = TrainConfig(name="a", model=SMALL, seq_len=512, num_steps=200)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(fsdp=2, sp=2, tp=2)


@pytest.fixture
def free(monkeypatch):
    """Say how much memory is free, in bytes."""
    return lambda num_bytes: monkeypatch.setattr(validate, "available_on_host", lambda: num_bytes)


def test_require_memory_refuses_a_6b_model_on_a_laptop(mesh, free):
    free(16 * 2**30)
    config = dataclasses.replace(CONFIG, model=LARGE, seq_len=4096)
    with pytest.raises(ConfigError) as error:
        require_memory(config, mesh)
    need = 16 * LARGE.num_parameters / 2**30
    message = str(error.value)
    assert f"{LARGE.num_parameters:,} parameters need {need:,.1f} GiB with gradients and moments" in message
    assert "the host's memory, which 8 devices share, has 16.0 GiB free; take a smaller model" in message
    assert "\n" not in message


def test_require_memory_takes_what_fits_to_the_byte(mesh, free):
    need = 8 * (state_bytes(CONFIG, mesh) + kept_bytes(CONFIG, mesh))
    free(need)
    require_memory(CONFIG, mesh)
    free(need - 1)
    with pytest.raises(ConfigError):
        require_memory(CONFIG, mesh)


def test_state_bytes_are_shared_out_over_the_mesh(mesh):
    every = 16 * SMALL.num_parameters
    assert every <= 8 * state_bytes(CONFIG, mesh) < 1.1 * every, "norms' scales are small, and on every device"
    assert state_bytes(CONFIG, make_mesh(dp=8)) == pytest.approx(every, rel=0.01)


def test_kept_bytes_count_inputs_that_devices_keep(mesh):
    assert kept_bytes(CONFIG, mesh) == 512 // 4 * 2 * 32 * jax.numpy.dtype(SMALL.compute_dtype).itemsize
    offloading = dataclasses.replace(CONFIG, model=dataclasses.replace(SMALL, remat="offload"))
    assert kept_bytes(offloading, mesh) == 0


def test_require_memory_refuses_nothing_where_free_is_unknown(mesh, free):
    free(None)
    require_memory(dataclasses.replace(CONFIG, model=LARGE), mesh)


def test_available_on_host_knows_containers(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "_LIMITS", ())
    free = available_on_host()
    assert 2**20 < free < 2**50
    limit = tmp_path / "max"
    monkeypatch.setattr(validate, "_LIMITS", [str(limit)])
    limit.write_text("5000\n")
    assert available_on_host() == 5000
    limit.write_text("max\n")
    assert available_on_host() > 5000


@pytest.mark.parametrize(
    ("stats", "refused"), [({"bytes_limit": 100}, True), ({"bytes_limit": 2**40}, False), ({}, False)]
)
def test_require_memory_asks_an_accelerator_for_its_own(mesh, monkeypatch, stats, refused):
    device = types.SimpleNamespace(
        process_index=0, platform="gpu", device_kind="NVIDIA H100", memory_stats=lambda: stats | {"bytes_in_use": 1}
    )
    pretended = types.SimpleNamespace(devices=types.SimpleNamespace(flat=[device] * 8), shape=mesh.shape)
    monkeypatch.setattr(validate, "sharded_abstract_state", lambda config, _: sharded_abstract_state(config, mesh))
    if not refused:
        require_memory(CONFIG, pretended)
        return
    with pytest.raises(ConfigError, match="each NVIDIA H100 has 0.0 GiB free"):
        require_memory(CONFIG, pretended)
