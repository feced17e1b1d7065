"""What `impl="auto"` takes, by platform and by what is asked, and with which tiles."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest

import ring_attention as ra
from ring_attention.attention import kernels
from ring_attention.attention.blocks import as_blocks
from ring_attention.attention.device_kind import DeviceKind, kind_here
from ring_attention.attention.kernels import choose, splash, tile_sizes, tokamax
from ring_attention.hardware.chips import CHIPS
from ring_attention.parallel.kernel_choice import choose_context
from ring_attention.parallel.strategies import STRATEGIES

V5E, H100 = DeviceKind("tpu", "TPU v5 lite"), DeviceKind("gpu", "NVIDIA H100 80GB HBM3")
AMD, CPU, UNKNOWN = DeviceKind("gpu", "AMD Instinct MI300X"), DeviceKind("cpu", "cpu"), DeviceKind(None, None)
ALIBI = dict(alibi_slopes=np.ones(4, np.float32))
DROPOUT = dict(dropout_rate=0.1, dropout_key=jax.random.key(0))
SHAPE = (2, 512, 4, 128)

CHOICES = [  # devices, strategy, layout, shape of a shard, dtype, mask, kernel, words of the reason
    (V5E, "ring", "zigzag", SHAPE, "bfloat16", {}, "splash", ""),
    (V5E, "ring", "zigzag", SHAPE, "float32", dict(softcap=5.0, window=100), "splash", ""),
    (V5E, "ring", "zigzag", SHAPE, "float16", {}, "xla", "takes bfloat16 or float32, got float16"),
    (V5E, "ring", "zigzag", SHAPE, "bfloat16", ALIBI, "xla", "has no alibi_slopes"),
    (V5E, "ring", "striped", SHAPE, "bfloat16", DROPOUT, "xla", "has no dropout_rate"),
    (V5E, "ring", "zigzag", (2, 500, 4, 128), "bfloat16", {}, "splash", ""),
    (V5E, "sparse", "contiguous", SHAPE, "bfloat16", {}, "xla", "how keys are spaced"),
    (H100, "ring", "zigzag", SHAPE, "bfloat16", {}, "cudnn", ""),
    (H100, "ring", "striped", SHAPE, "float16", dict(window=100), "cudnn", ""),
    (H100, "ring", "zigzag", SHAPE, "float32", {}, "xla", "takes bfloat16 or float16, got float32"),
    (H100, "ring", "zigzag", SHAPE, "bfloat16", dict(softcap=5.0), "tokamax", ""),
    (H100, "ring", "zigzag", SHAPE, "bfloat16", ALIBI, "xla", 'tokamax: impl="tokamax" has no alibi_slopes'),
    (H100, "ring", "zigzag", (2, 512, 4, 100), "bfloat16", {}, "xla", "multiples of 8"),
    (AMD, "ring", "zigzag", SHAPE, "bfloat16", {}, "xla", "for GPUs of NVIDIA"),
    (CPU, "ring", "zigzag", SHAPE, "bfloat16", {}, "xla", ""),
    (UNKNOWN, "ring", "zigzag", SHAPE, "bfloat16", {}, "xla", ""),
]


def _chosen(kind, strategy, layout, shape, dtype, mask, failure=None, impl="auto", block_sizes=None):
    """(context, choice) of a ring of 4."""
    made = []

    def choose_and_tell(impl, kind, accepts):
        made.append(choose.choose(kind, accepts, lambda kernel, kind: failure) if impl == "auto" else None)
        return kernels.find_kernel(made[0].impl if made[0] else impl)

    context = choose_context(
        STRATEGIES[strategy],
        impl,
        block_sizes,
        axis_name="sp",
        layout=ra.SequenceLayout(layout, 4),
        kind=kind,
        shape=shape,
        dtype=dtype,
        kv_heads=shape[2] // 2,
        make_mask=lambda: splash.MaskSpec(
            scale=1.0,
            window=mask.get("window"),
            softcap=mask.get("softcap"),
            slopes=mask.get("alibi_slopes"),
            dropout=mask.get("dropout_key"),
        ),
        choose=choose_and_tell,
    )
    return context, made[0]


@pytest.mark.parametrize("case", CHOICES, ids=lambda case: f"{case[0]}-{case[6]}-{case[7]}")
def test_auto_takes_the_fastest_kernel_that_can_do_it_and_says_why_not(case, monkeypatch):
    *asked, impl, reason = case
    monkeypatch.setattr(tokamax, "_require_bindings", lambda generation: None)  # it is there, as it were
    context, choice = _chosen(*asked)
    assert (context.kernel.name, choice.impl) == (impl, impl)
    assert reason in choice.reason
    assert bool(choice.missed) == bool(choice.reason) == bool(reason)


def test_auto_leaves_a_kernel_that_failed_its_self_test():
    context, choice = _chosen(*CHOICES[0][:6], failure="dq is wrong")
    assert context.kernel.name == "xla"
    assert choice == choose.Choice("xla", "splash", "dq is wrong")


def test_auto_says_why_it_left_each_of_several_kernels(monkeypatch):
    def find(generation):
        raise ModuleNotFoundError("No module named 'tokamax'")

    monkeypatch.setattr(tokamax, "_library", find)
    monkeypatch.setattr(tokamax, "_require_bindings", tokamax._require_bindings.__wrapped__)
    _, choice = _chosen(H100, "ring", "zigzag", SHAPE, "bfloat16", dict(softcap=5.0))
    assert (choice.impl, choice.missed) == ("xla", "cudnn or tokamax")
    assert 'cudnn: impl="cudnn" has no softcap; leave it out, or use impl="xla"; tokamax: impl=' in choice.reason
    assert (
        "needs the package tokamax, and No module named 'tokamax'; pip install \"ring_attention[tokamax]\""
        in choice.reason
    )


@pytest.mark.parametrize("kind", [DeviceKind(chip.platform, chip.kinds[0]) for chip in CHIPS.values()] + [AMD], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_no_accelerator_gets_the_tiles_of_a_cpu(kind, head_dim):
    for kernel in ("xla", *choose.FUSED[kind.platform]):
        tiles = tile_sizes.tiles_of(kernel, kind, head_dim, group=4)
        assert tiles.q * tiles.kv > 256 * 256
        assert kernel == "splash" or 4 * tiles.heads <= tile_sizes.MOST_HEADS
    assert tile_sizes.tiles_of("xla", CPU, head_dim, 4) == tile_sizes.tiles_of("xla", UNKNOWN, head_dim, 4)
    assert tile_sizes.tiles_of("xla", CPU, head_dim, 4) == ra.BlockSizes()


def test_a_gpu_reads_more_slots_at_once_than_a_tile_of_training_has():
    gpu = DeviceKind("gpu", "NVIDIA H100 80GB HBM3")
    assert tile_sizes.slots_of(gpu, 128, 4) == 8192
    for kind in (CPU, V5E):
        assert tile_sizes.slots_of(kind, 128, 4) == tile_sizes.tiles_of("xla", kind, 128, 4).kv


def test_sizes_that_are_given_stay_and_those_left_open_are_chosen():
    context, _ = _chosen(*CHOICES[0][:6], block_sizes=ra.BlockSizes(q=128, kv=-1, cut=-1, heads=-1))
    chosen = tile_sizes.tiles_of("splash", V5E, 128, 2)
    assert context.blocks == dataclasses.replace(chosen, q=128)
    assert as_blocks(None, chosen) == chosen
    assert as_blocks(ra.BlockSizes(), chosen) == ra.BlockSizes()


def _calls_pallas(**settings):
    """Whether a ring over TPU chips that are not there calls a kernel of Pallas."""
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("sp",), axis_types=auto, abstract_device=device)
    q = jax.ShapeDtypeStruct((1, 512, 2, 64), "bfloat16")
    attend = functools.partial(ra.ring_attention, mesh=mesh, **settings)
    return "pallas_call" in str(jax.make_jaxpr(attend)(q, q, q))


def test_auto_goes_by_the_devices_of_the_mesh(caplog):
    choose.log_once.cache_clear()
    caplog.set_level(logging.INFO, choose.__name__)
    assert _calls_pallas()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert not _calls_pallas(alibi_slopes=np.ones(2))
    assert not _calls_pallas(alibi_slopes=np.ones(2), window=100)
    assert not _calls_pallas(impl="xla")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1, "the same reason is logged once"
    assert "xla on TPU v5 lite, where splash would be faster: " in warnings[0]
    assert "has no alibi_slopes" in warnings[0]
    with pytest.raises(ValueError, match="has no alibi_slopes"):
        _calls_pallas(impl="splash", alibi_slopes=np.ones(2))


def test_the_kind_of_device_is_that_of_the_surroundings():
    device = jax.sharding.AbstractDevice(V5E.name, 1, V5E.platform)
    seen = []

    def on_shard(x):
        seen.append(kind_here(x))
        return x

    for known in (device, None):
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.sharding.AbstractMesh((2,), ("sp",), axis_types=auto, abstract_device=known)
        sharded = jax.shard_map(on_shard, mesh=mesh, in_specs=jax.P("sp"), out_specs=jax.P("sp"))
        jax.eval_shape(sharded, jax.ShapeDtypeStruct((4,), "float32"))
    assert seen == [V5E, UNKNOWN]
    assert kind_here() == kind_here(jax.device_put(np.zeros(1))) == CPU
