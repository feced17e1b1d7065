import re

import jax
import jax.numpy as jnp
import pytest
from hlo_texts import RING, TPU_RING, X, hlo
from jax import lax
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.hardware.topology import find_topology
from ring_attention.models.config import ModelConfig
from ring_attention.planning.hlo.transfers import warnings_of
from ring_attention.planning.shares import Share
from ring_attention.training.config import AttentionConfig, MeshConfig, TrainConfig


def _share(strategy: str = "ring", t: int = 4096, **model) -> Share:
    sizes = dict(
        vocab_size=32_000, num_layers=3, model_dim=1536, num_heads=12, num_kv_heads=6, head_dim=128, ffn_dim=5120
    )
    config = TrainConfig(
        name="test",
        model=ModelConfig(**(sizes | model), compute_dtype="bfloat16"),
        attention=AttentionConfig(strategy=strategy, impl="splash", block_q=256, block_kv=256),
        mesh=MeshConfig(sp=8),
        seq_len=8 * t,
        num_steps=1000,
    )
    return Share.of(config, find_topology("v5e:2x4"))


def test_warnings_of_a_clean_program_are_none():
    text = hlo("""  %w = bf16[192,12,128] parameter(0)
  %weight = bf16[1536,12,128] all-gather(%w), replica_groups=[1,8]<=[8], dimensions={0}
  %ids = s32[1,32768] all-gather(%w), replica_groups=[1,8]<=[8], dimensions={1}
  %tile = pred[6,256,256] custom-call(), custom_call_target="anything"
  %scores = f32[2,4096,256] custom-call(), custom_call_target="anything"
  %norms = f32[3,1536] all-reduce(%w), replica_groups=[1,8]<=[8], to_apply=%add
  %queries = bf16[1,12,4096,128] custom-call(), custom_call_target="anything"
""")
    assert warnings_of(text, _share()) == []
    ring = TPU_RING.replace(RING, "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}")
    assert warnings_of(ring, _share()) == []


def test_warnings_of_names_a_synchronous_permute():
    (line,) = warnings_of(hlo(X + f"  ROOT %k.1 = f32[1000] collective-permute(%x), {RING}"), _share())
    assert re.match(r"%k.1 \(\?, 0.00381 MiB, 1 times\) is synchronous, nothing hides it; give the compiler work", line)


def test_warnings_of_names_transfers_with_nothing_between():
    """The ring of `TPU_RING`, its kernel moved before the transfers, as one v6e compiler placed them beside tp."""
    ring = TPU_RING.replace(RING, "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}")
    kernel = re.search(r"  %fusion\.111 = .*?\n  %splash_mha_fwd_residuals.*?\n(?=  %add)", ring, re.DOTALL)[0]
    early = ring.replace(kernel, "").replace(
        "  %collective-permute-start = ", kernel + "  %collective-permute-start = "
    )
    (line,) = warnings_of(early, _share())
    assert re.match(
        r"2 of 2 transfers start and end with nothing .* the first %collective-permute-start \(forward, 1 ", line
    )
    small = early.replace("1024,128]", "256,128]")
    assert warnings_of(small, _share()) == []


@pytest.mark.parametrize(
    ("line", "strategy", "seen"),
    [
        ("bf16[1,6,32768,128] all-gather(%p)", "ring", True),
        ("bf16[1,1,32768,128] all-gather(%p)", "all_gather", True),
        ("bf16[25165824] all-gather(%p)", "ring", True),  # as many elements as all keys
        ("bf16[1,6,32768,128] all-reduce(%p)", "ring", True),
        ("bf16[1,3,32768,128] all-to-all(%p)", "ring", True),
        ("bf16[1,3,32768,128] all-to-all(%p)", "ulysses", False),
        ("bf16[1,6,4096,128] all-gather(%p)", "ring", False),
        ("bf16[32000,1536] all-gather(%p)", "ring", False),
        ("bf16[3,1536,5120] all-gather(%p)", "ring", False),
        ("s32[1,32768] all-gather(%p)", "ring", False),
    ],
)
def test_whole_sequences_are_seen_and_weights_are_not(line, strategy, seen):
    heads = dict(num_heads=16, num_kv_heads=8) if strategy == "ulysses" else {}
    text = hlo(f"  %p = bf16[8] parameter(0)\n  ROOT %r = {line}, replica_groups=[1,8]<=[8], to_apply=%add")
    lines = warnings_of(text, _share(strategy, **heads))
    assert len(lines) == seen
    if seen:
        assert re.match(
            r"all-[\w-]+ %r gives each device bf16\[[\d,]+\] \([\d.]+ MiB\), all 32768 tokens; keep", lines[0]
        )


def test_whole_sequences_ignores_gathers_off_the_ring():
    text = hlo("  %p = bf16[8] parameter(0)\n  ROOT %r = bf16[1,6,32768,128] all-gather(%p), replica_groups={{0},{1}}")
    assert warnings_of(text, _share()) == []


@pytest.mark.parametrize(
    ("array", "what"),
    [
        ("pred[4096,32768]", "a mask of whole shards"),  # [t, T]
        ("pred[1,1,4096,4096]", "a mask of whole shards"),
        ("s32[4096,4096]", "a mask of whole shards"),
        ("f32[1,32768,32768]", "a mask of whole shards"),
        ("pred[7,4096,256]", "a mask for each hop"),
        ("f32[8,256,256]", "a mask for each hop"),
        ("pred[7,16,256,256]", "a mask for each hop"),
        ("bf16[4096,4096]", None),
        ("pred[256,256]", None),
        ("f32[12,4096,128]", None),
        ("f32[4096,1536]", None),
        ("f32[7,4096]", None),
    ],
)
def test_kept_masks_are_seen(array, what):
    text = hlo(f"  %p = s32[4096] parameter(0)\n  %m.1 = {array}{{1,0}} compare(%p, %p), direction=GE")
    lines = warnings_of(text, _share())
    assert len(lines) == (what is not None)
    if what:
        assert re.match(rf"%m.1 keeps {re.escape(array)} \([\d.e+]+ MiB\), {what}, in memory; compute it", lines[0])


def test_kept_masks_are_seen_outside_of_fusions_only():
    called = """%inside (a: s32[4096]) -> f32[4096] {
  %a = s32[4096] parameter(0)
  %m = pred[4096,4096] compare(%a, %a), direction=GE
  ROOT %o = f32[4096] reduce(%m)
}"""
    fused = "  %p = s32[4096] parameter(0)\n  %f = f32[4096] fusion(%p), kind=kLoop, calls=%inside"
    assert warnings_of(hlo(fused, called), _share()) == []
    given = "  %p = pred[4096,4096] parameter(0)\n  %g = (pred[4096,4096]) tuple(%p)"
    assert len(warnings_of(hlo(given), _share())) == 1


def test_kept_masks_ignores_sizes_of_the_model():
    text = hlo("  %p = s32[4096] parameter(0)\n  %m = f32[4096,4096]{1,0} add(%p, %p)")
    assert len(warnings_of(text, _share())) == 1
    assert warnings_of(text, _share(ffn_dim=4096)) == []


def test_kept_masks_ignores_a_tile_as_large_as_a_shard():
    share = _share(t=256)
    text = hlo("  %p = s32[256] parameter(0)\n  %m = pred[256,256]{1,0} compare(%p, %p), direction=GE")
    assert warnings_of(text, share) == []
    assert len(warnings_of(text.replace("pred[256,256]", "pred[256,2048]"), share)) == 1


def test_kept_masks_of_a_real_program_are_seen():
    model = dict(vocab_size=1000, model_dim=96, num_heads=3, num_kv_heads=3, head_dim=32, ffn_dim=160)
    share = _share(t=1024, **model)
    shape, mesh = jax.ShapeDtypeStruct((1, 8192, 3, 32), "float32"), ra.make_mesh(sp=8)

    def dense(q, k, v):
        k, v = (lax.all_gather(x, "sp", axis=1, tiled=True) for x in (k, v))
        seen = lax.axis_index("sp") * 1024 + jnp.arange(1024)[:, None] >= jnp.arange(8192)
        scores = jnp.where(seen, jnp.einsum("bthd,bshd->bhts", q, k), -1e9)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)

    ring = lambda *qkv: ra.ring_attention(*qkv, mesh=mesh, layout="zigzag", impl="xla")  # noqa: E731
    sharded = jax.shard_map(dense, mesh=mesh, in_specs=Spec(None, "sp"), out_specs=Spec(None, "sp"))
    texts = {fn: jax.jit(fn).lower(shape, shape, shape).compile().as_text() for fn in (sharded, ring)}
    found = [line for line in warnings_of(texts[sharded], share) if "synchronous" not in line]
    assert sum("gives each device f32[1,8192,3,32]" in line for line in found) == 2
    assert any("a mask of whole shards" in line for line in found)
    assert [line for line in warnings_of(texts[ring], share) if "synchronous" not in line] == []
