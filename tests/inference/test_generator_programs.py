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
from ring_attention.inference import cache, programs
from ring_attention.inference.generator import Generator
from ring_attention.inference.plan import make_plan
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
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


# --- Layers that differ, prompts in pieces ----------------------------------------------------------------------------

WINDOW, CHUNK, PIECE = 100, 30, 64
KINDS = dataclasses.replace(
    MODEL,
    num_layers=4,
    layers=(LayerKind(window=WINDOW), LayerKind(window=WINDOW), LayerKind(), LayerKind(chunk=CHUNK)),
)


@functools.cache
def _writer_by_kinds(capacity):
    mesh = ra.make_mesh(sp=2, tp=2, devices=jax.devices()[:4])
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_parameters(AttentionConfig().completed(KINDS)))
    attention = AttentionConfig(block_kv=128)
    return Generator(KINDS, params, mesh=mesh, capacity=capacity, attention=attention, chunk=PIECE)


def test_cache_of_each_kind_is_what_its_tokens_see():
    a_slot = 2 * ROWS * K // 2 * D * 4  # bytes of a device of tp=2, on each layer; sp=2 shares the slots
    for capacity in (1000, 4000):
        writer = _writer_by_kinds(capacity)
        held = {"run0": 2 * WINDOW // 2 * a_slot, "run1": capacity // 2 * a_slot, "run2": CHUNK // 2 * a_slot}
        assert writer.cache_bytes_by_run(ROWS) == held
        for program in (writer.step_program(ROWS), writer.extend_program(ROWS)):
            assert compiled.memory_of(program).aliased == sum(held.values()) + 3 * 4 * ROWS, "it is written in place"
    assert _writer_by_kinds(80).cache_bytes_by_run(ROWS)["run0"] == 2 * 40 * a_slot, "no more than the capacity"
    grown = _writer_by_kinds(4000).cache_bytes(ROWS) - _writer_by_kinds(1000).cache_bytes(ROWS)
    assert grown == 3000 // 2 * a_slot, "bytes a token: those of the one layer that sees all"


def test_memory_of_a_piece_of_a_prompt_does_not_grow_with_the_prompt():
    def temporaries(program):
        return compiled.memory_of(program).temporaries

    short, long = (_writer_by_kinds(capacity) for capacity in (1000, 4000))
    piece = [temporaries(writer.extend_program(ROWS)) for writer in (short, long)]
    positions = 4 * ROWS * (4000 - 1000) // 2  # int32, of the slots of a device
    assert piece[1] - piece[0] <= 2 * positions, "and nothing else: no copy of the cache"
    whole = [temporaries(writer.prefill_program(ROWS, tokens)) for writer, tokens in ((short, 512), (long, 2048))]
    assert whole[1] > 3 * whole[0], "the control: a prompt that is read at once"


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
    plan, rows, slots = make_plan(model, mesh, capacity=sp * 4096), 4, 4096

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
    held = cache.cache_bytes(model, model.loop.runs[0], rows, sp * slots, sp, tp)
    assert memory.aliased >= held
    assert memory.temporaries < held / 8
