"""What the step of a token sends and holds, from the compiled program."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.attention import cached
from ring_attention.hardware.pods import pod_devices
from ring_attention.inference import cache, generator, programs
from ring_attention.inference.generator import Generator
from ring_attention.models.config import ModelConfig
from ring_attention.models.transformer import abstract_parameters, parameter_specs
from ring_attention.planning.hlo import compiled
from ring_attention.training.config import AttentionConfig

V, L, M, H, K, D, F = 40, 3, 64, 4, 2, 6, 96
MODEL = ModelConfig(vocab_size=V, num_layers=L, model_dim=M, num_heads=H, num_kv_heads=K, head_dim=D, ffn_dim=F)
ROWS, SLOTS = 4, 1024  # slots of a device, whatever the mesh
MESHES = [(1, 2, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]  # dp, sp, tp


@functools.cache
def _writer(dp, sp, tp, model=MODEL):
    shape = dict(dp=dp, sp=sp, tp=tp)
    mesh = ra.make_mesh(**shape, devices=jax.devices()[: int(np.prod(list(shape.values())))])
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_parameters(model))
    attention = AttentionConfig(block_kv=128)
    return Generator(model, params, mesh=mesh, capacity=SLOTS * mesh.shape["sp"], attention=attention)


def _stated(dp, sp, tp):
    """kind -> (collectives, bytes) of a step, as the docstring of `make_step` has them; float32, 4 bytes a number."""
    b, h, k, f, m = ROWS // dp, H // tp, K // tp, F // tp, M // sp
    summed = L * (b * (h + 2 * k) * D + b * 2 * f + 2 * b * m) + b * m + b * V // tp
    gathered = L * (b * sp * h * (D + 1) + 2 * b * M) + b * M + b * V
    return {"all-reduce": (4 * L + 2, 4 * summed), "all-gather": (3 * L + 2, 4 * gathered)}


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_generation_step_sends_what_is_stated_alone(shape):
    text = _writer(*shape).step_program(ROWS).as_text()
    assert compiled.totals(text) == _stated(*shape)


def _weights(dp, sp, tp):
    """Bytes of a device's share of the parameters."""
    sizes = dict(dp=dp, fsdp=1, sp=sp, tp=tp)

    def share(x, spec):
        parts = (name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry))
        return x.size * 4 // int(np.prod([sizes[name] for name in parts]))

    is_spec = lambda x: isinstance(x, Spec)  # noqa: E731
    return sum(
        jax.tree.leaves(jax.tree.map(share, abstract_parameters(MODEL), parameter_specs(MODEL), is_leaf=is_spec))
    )


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_generation_device_holds_its_share_and_little_else(shape):
    (dp, _, tp), writer = shape, _writer(*shape)
    b = ROWS // dp
    step, cache = writer.step_program(ROWS), 2 * L * b * SLOTS * K // tp * D * 4
    memory, by_row = compiled.memory_of(step), 3 * 4 * b
    assert writer.cache_bytes(ROWS) == cache
    assert memory.arguments == _weights(*shape) + cache + by_row
    assert memory.aliased == cache + by_row, "it is written in place"
    assert memory.temporaries < cache / 6

    def gathers_weights(program):
        return any(array.shape[-2:] == (M, F // tp) for array in compiled.arrays(program.as_text()))

    assert not gathers_weights(step)
    assert gathers_weights(writer.prefill_program(ROWS, 64)), "the control"


def test_generation_memory_does_not_grow_with_the_ring():
    temporary = {P: compiled.memory_of(_writer(1, P, 1).step_program(ROWS)).temporaries for P in (2, 4, 8)}
    gathered = ROWS * H * (D + 1) * 4  # bytes that each device of the ring adds to the merge
    assert temporary[8] < temporary[2] + 6 * 4 * gathered


def test_cache_as_bits_is_not_widened_in_half_precision(monkeypatch):
    model = dataclasses.replace(MODEL, compute_dtype="bfloat16")

    def temporaries():
        _writer.cache_clear()
        return compiled.memory_of(_writer(1, 2, 1, model).step_program(ROWS)).temporaries

    held = _writer(1, 2, 1, model).cache_bytes(ROWS)
    assert temporaries() < held / 2
    for module in (cached, cache):
        monkeypatch.setattr(module, "as_bits", lambda x: x)
    if jax.__version_info__ < (0, 11):  # XLA's CPU compiler of jaxlib 0.12 no longer widens it by itself
        assert temporaries() > 2 * held, "the control: all of it in float32"


@pytest.mark.pod
@pytest.mark.parametrize(("sp", "tp"), [(8, 1), (2, 4)])
def test_cache_is_not_copied_by_the_compiler_for_a_pod(sp, tp):
    model = ModelConfig(
        vocab_size=256,
        num_layers=2,
        model_dim=512,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
        ffn_dim=512,
        compute_dtype="bfloat16",
    )
    mesh = ra.make_mesh(sp=sp, tp=tp, devices=pod_devices("v5e:2x4"))
    plan, rows, slots = generator._plan(model, mesh, capacity=sp * 4096), 4, 4096

    def abstract(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    specs = parameter_specs(model)
    params = jax.tree.map(lambda x, spec: abstract(x.shape, "bfloat16", spec), abstract_parameters(model), specs)
    keys = abstract((2, rows, 4, sp * slots, 128), cache.cache_dtype(model), cache.CACHE_SPEC)
    by_row = (abstract((rows,), dtype, programs.ROWS) for dtype in ("int32", "int32", "uint32"))
    step = programs.make_step(plan, mesh).lower(
        params, {"layers": cache.KeyValueCache(keys, keys)}, programs.Rows(*by_row)
    )
    memory = compiled.memory_of(step.compile())
    held = cache.cache_bytes(model, rows, slots, tp)
    assert memory.aliased >= held
    assert memory.temporaries < held / 8
