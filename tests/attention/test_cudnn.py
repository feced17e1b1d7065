"""cuDNN as the kernel of a ring: on a GPU itself, elsewhere its two primitives in plain JAX, against the oracle."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_rings import LAYOUTS, B, D, H, K, P, T, each_padded, each_ring, each_strategy, run, too_large
from ring_helpers import Bound, results, ring_mesh

import ring_attention as ra
from ring_attention.attention import kernels
from ring_attention.attention.kernels import cudnn, cudnn_device, static_calls
from ring_attention.attention.kernels.static_tiles import CAUSAL, FULL, OTHER, StaticTile, plan
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair, Tokens, visible
from ring_attention.parallel import context
from ring_attention.testing import random_qkv

ONE_DOCUMENT_ENDS = np.where(np.arange(T) < 150, 1, 2)[None].repeat(B, 0)
MASKS = {
    "causal": {},
    "bidirectional": dict(causal=False),
    "window": dict(window=100),
    "documents": dict(segment_ids=ONE_DOCUMENT_ENDS, sinks=np.linspace(-1, 1, H, dtype=np.float32)),
}


def _weights(q, k, lse, scale, part):
    """float32 [B,H,t,s] of one tile, and k with its heads repeated for those of q."""
    k = jnp.repeat(k, q.shape[1] // k.shape[1], 1).astype(jnp.float32)
    scores = jnp.einsum("bhtd,bhsd->bhts", q.astype(jnp.float32), k) * scale
    if part.kind == CAUSAL:
        behind = jnp.arange(q.shape[2])[:, None] - jnp.arange(k.shape[2])
        seen = (behind >= 0) & (behind < (part.window or q.shape[2]))
        scores = jnp.where(seen, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, -1) if lse is None else lse
    return jnp.exp(scores - lse[..., None]), lse, k


def _attention(q, k, v, part, pair):
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]  # they take one head dim
    weights, lse, _ = _weights(q, k, None, pair.mask.scale, part)
    v = jnp.repeat(v, q.shape[1] // v.shape[1], 1)
    return jnp.einsum("bhts,bhsd->bhtd", weights.astype(v.dtype), v), lse


def _gradients(q, out, lse, dout, k, v, part, pair):
    K, dtype, scale = k.shape[1], q.dtype, pair.mask.scale
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] == out.shape[-1] == dout.shape[-1]
    p, _, k = _weights(q, k, lse, scale, part)
    v, dout = jnp.repeat(v, q.shape[1] // K, 1).astype(jnp.float32), dout.astype(jnp.float32)
    delta = jnp.sum(dout * out.astype(jnp.float32), -1, keepdims=True)
    ds = p * (jnp.einsum("bhtd,bhsd->bhts", dout, v) - delta) * scale
    of_keys = [jnp.einsum("bhts,bhtd->bhsd", x, y) for x, y in ((ds, q.astype(jnp.float32)), (p, dout))]
    dk, dv = (x.reshape(x.shape[0], K, -1, *x.shape[2:]).sum(2).astype(dtype) for x in of_keys)
    return jnp.einsum("bhts,bhsd->bhtd", ds, k).astype(dtype), dk, dv


@pytest.fixture(autouse=True)
def _primitives(monkeypatch):
    """Where there is no GPU, what the primitives are documented to do."""
    context._sharded.cache_clear()  # it does not know that a kernel was replaced
    if jax.default_backend() == "gpu":
        return
    monkeypatch.setattr(cudnn, "_attention", _attention)
    monkeypatch.setattr(cudnn, "_gradients", _gradients)
    monkeypatch.setitem(kernels.KERNELS, "cudnn", cudnn.CUDNN._replace(platform=None))


@each_ring(MASKS)
def test_cudnn_ring_is_as_exact_as_dense_attention(layout, mask):
    assert too_large("cudnn", layout, MASKS[mask]) == {}


@pytest.mark.slow
@each_strategy
def test_cudnn_serves_other_strategies_too(strategy):
    assert too_large("cudnn", "zigzag", {}, kv_heads=4, dtype="float16", strategy=strategy) == {}


@pytest.mark.slow
@each_padded
def test_cudnn_pads_lengths_that_do_not_divide(arguments):
    assert too_large("cudnn", "zigzag", arguments, tokens=T - 19, rows=1) == {}


def test_cudnn_attends_on_one_device_in_a_single_call():
    qkv = random_qkv(0, B, T, H, K, D, dtype="bfloat16")
    mask = dict(window=33, kv_lengths=np.arange(T - B, T))  # keys that are padding are for xla
    attend = functools.partial(ra.blockwise_attention, impl="cudnn")
    assert Bound(qkv, **mask).too_large(results(attend, qkv, **mask)) == {}
    with pytest.raises(ValueError, match="impl='cudnn' cannot differentiate the lse; leave return_lse out"):
        attend(*qkv[:3], return_lse=True)


@pytest.mark.parametrize("widths", [(24, 16), (16, 24)], ids=["narrower", "wider"])
def test_cudnn_takes_values_of_another_head_dim(widths):
    qkv = random_qkv(0, 1, T, H, K, widths[0], dtype="bfloat16", D_v=widths[1])
    attend = functools.partial(ra.blockwise_attention, impl="cudnn", window=33)
    assert Bound(qkv, window=33).too_large(results(attend, qkv)) == {}


@pytest.mark.parametrize("mask", MASKS)
def test_cudnn_primitives_are_traced_and_lowered_for_cuda(monkeypatch, mask):
    monkeypatch.undo()
    monkeypatch.setitem(kernels.KERNELS, "cudnn", cudnn.CUDNN._replace(platform=None))
    attend = functools.partial(ra.ring_attention, mesh=ring_mesh(2), layout="zigzag", impl="cudnn", **MASKS[mask])

    def run(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    q, k = (jax.ShapeDtypeStruct((B, T, heads, D), "bfloat16") for heads in (H, K))
    text = jax.jit(run).trace(q, k, k, q).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert ("PADDING" in text, "BiasSoftmax" in text) == (False, False)


@pytest.mark.parametrize("wrong", ["a plan of another device", "the lse of the hop", "masks left out"])
def test_cudnn_mistakes_exceed_the_bound(monkeypatch, wrong):
    qkv = random_qkv(0, 1, T, H, K, D, dtype="bfloat16")
    attention, gradients = cudnn._attention, cudnn._gradients
    if wrong == "a plan of another device":
        monkeypatch.setattr(static_calls, "plan", lambda pair: (plan(pair)[0], jnp.int32(0)))
        want = {"out", "dq", "dk", "dv"}
    elif wrong == "the lse of the hop":

        def local(q, out, lse, dout, k, v, *tile):
            out, lse = attention(q, k, v, *tile)
            return gradients(q, out, lse, dout, k, v, *tile)

        monkeypatch.setattr(cudnn, "_gradients", local)
        want = {"dq", "dk", "dv"}
    else:
        monkeypatch.setattr(cudnn, "CAUSAL", "unknown")
        replaced = functools.partial(StaticTile._replace, kind=FULL)
        monkeypatch.setattr(
            static_calls, "plan", lambda pair: ([[*map(replaced, x)] for x in plan(pair)[0]], plan(pair)[1])
        )
        want = {"out", "dq", "dk", "dv"}
    assert set(Bound(qkv).too_large(run("cudnn", qkv, "zigzag", {}, devices=2))) == want


def test_cudnn_refuses_what_it_cannot_do(monkeypatch):
    q = jnp.zeros((1, 64, 4, 16), jnp.bfloat16)
    attend = functools.partial(ra.ring_attention, q, q, q, mesh=ring_mesh(2), impl="cudnn")
    with pytest.raises(ValueError, match='impl="cudnn" has no softcap; leave it out, or use impl="xla"'):
        attend(softcap=3.0)
    with pytest.raises(ValueError, match='impl="cudnn" has no intervals; leave it out, or use impl="xla"'):
        ra.blockwise_attention(q, q, q, impl="cudnn", intervals=ra.Intervals.chunks(np.arange(64), 8))
    with pytest.raises(ValueError, match='impl="cudnn" has no alibi_slopes'):
        attend(alibi_slopes=jnp.ones(4))
    with pytest.raises(ValueError, match='impl="cudnn" has no dropout_rate'):
        attend(dropout_rate=0.1, dropout_key=jax.random.key(0))
    with pytest.raises(ValueError, match='impl="cudnn" has no traced scale'):
        jax.eval_shape(lambda x: ra.blockwise_attention(q, q, q, scale=x, impl="cudnn"), 0.5)
    with pytest.raises(ValueError, match="takes bfloat16 or float16, got float32"):
        ra.blockwise_attention(*[q.astype("float32")] * 3, impl="cudnn")
    with pytest.raises(ValueError, match="head dims that are multiples of 8, at most 256, got 12"):
        ra.blockwise_attention(*[q[..., :12]] * 3, impl="cudnn")
    with pytest.raises(ValueError, match="needs queries and keys that are evenly spaced in a few runs"):
        ra.blockwise_attention(q, q, q, impl="cudnn", q_positions=jnp.arange(64))
    monkeypatch.undo()  # which lets it run on any platform
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="impl='cudnn' runs on gpu devices, but these are cpu"):
            attend()


# --- Versions and devices ---------------------------------------------------------------------------------------------

H100 = cudnn_device.Gpu("PJRT C API\ncuda 12080", (9, 0), 91200)


@pytest.mark.parametrize(
    ("gpu", "head_dim", "window", "refused"),
    [
        (H100, 256, 100, None),
        (H100, 264, None, "at most 256, got 264"),
        (None, 256, 100, None),
        (None, 252, None, "multiples of 8, at most 256, got 252"),
        (H100._replace(capability=(8, 0)), 128, None, None),
        (H100._replace(capability=(8, 6)), 192, None, "at most 128 before Hopper, .* capability 8.6, got 192"),
        (H100._replace(capability=(7, 5)), 64, None, "needs compute capability 8.0, but this GPU has 7.5"),
        (H100._replace(stack="rocm 60300", capability=None, cudnn=None), 64, None, "needs CUDA, .* 'rocm 60300'"),
        (H100._replace(cudnn=None), 64, None, "needs cuDNN, and JAX finds none; install another"),
        (H100._replace(capability=(10, 3)), 64, None, None),
        (H100._replace(capability=(10, 3), cudnn=91002), 64, None, "10.3 needs cuDNN 9.11, but this is 9.10.2"),
        (H100._replace(cudnn=91400), 64, None, None),
        (H100._replace(cudnn=91400), 64, 100, "another cuDNN than 9.14.0"),
    ],
)
def test_cudnn_refuses_what_a_gpu_or_a_version_cannot_do(gpu, head_dim, window, refused, monkeypatch):
    monkeypatch.setattr(cudnn, "gpu_here", lambda library: gpu)
    mask, q = MaskSpec(scale=1.0, window=window), jax.ShapeDtypeStruct((1, 4, 64, head_dim), "bfloat16")
    if refused is None:
        cudnn.check(mask, q)
        return
    with pytest.raises(ValueError, match=f'impl="cudnn" .*{refused}.*use impl="xla"'):
        cudnn.check(mask, q)


@pytest.mark.parametrize(("version", "refused"), [(90900, False), (91000, True), (91001, True), (91002, False)])
def test_cudnn_refuses_gradients_of_versions_without(version, refused, monkeypatch):
    monkeypatch.setattr(cudnn, "gpu_here", lambda library: H100._replace(cudnn=version))
    q = jnp.zeros((1, 64, 4, 16), jnp.bfloat16)
    attend = functools.partial(ra.blockwise_attention, impl="cudnn")
    jax.eval_shape(attend, q, q, q)
    gradients = functools.partial(jax.eval_shape, lambda *qkv: jax.vjp(attend, *qkv)[1](qkv[0]), q, q, q)
    if not refused:
        gradients()
        return
    words = f"no gradients with cuDNN 9.10.0 and 9.10.1, .* and this is 9.10.{version % 100}; install another"
    with pytest.raises(ValueError, match=words):
        gradients()


@pytest.mark.parametrize(
    ("capability", "stack", "found"),
    [("9.0", "cuda 12080", (9, 0)), ("12.0", "cuda 12080", (12, 0)), ("gfx942", "rocm 60300", None)],
)
def test_gpu_here_reads_what_jax_says_of_the_device(capability, stack, found, monkeypatch):
    client = types.SimpleNamespace(platform_version=stack)
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability, client=client)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    library = types.SimpleNamespace(check_cudnn_version=lambda: 91200)
    assert cudnn_device.gpu_here(library) == cudnn_device.Gpu(stack, found, 91200)
    device.platform = "cpu"
    assert cudnn_device.gpu_here(library) is None


# --- Plans ------------------------------------------------------------------------------------------------------------


def _pair(layout, device, source, t, mask):
    queries, keys = (Tokens(layout.shard_positions(i, t)[None], runs=layout.runs(t)) for i in (device, source))
    return BlockPair(queries, keys, mask, diagonal=device == source)


@pytest.mark.parametrize("mask", [dict(), dict(causal=False), dict(window=9), dict(window=9, causal=False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_static_tiles_cover_what_is_seen_and_no_more(layout, mask):
    layout, mask, t = LAYOUTS[layout], MaskSpec(scale=1.0, **mask), 16
    for device in range(P):
        for source in range(P):
            pair = _pair(layout, device, source, t, mask)
            plans, number = plan(pair)
            covered = np.zeros((t, t), int)
            q, k = (np.asarray(x.positions[0]) for x in (pair.queries, pair.keys))
            seen = visible(mask, Tokens(q[:, None]), Tokens(k[None]))
            seen = np.broadcast_to(True if seen is None else seen, (t, t))
            for part in plans[0 if number is None else int(number)]:
                here = np.s_[part.q : part.q + part.rows, part.kv : part.kv + part.columns]
                behind = np.arange(part.rows)[:, None] - np.arange(part.columns)
                window = t if part.window is None else part.window
                shown = {FULL: behind < t, CAUSAL: (behind >= 0) & (behind < window), OTHER: seen[here]}[part.kind]
                covered[here] += shown
            np.testing.assert_array_equal(covered, seen)


def test_plan_refuses_too_many_kinds_of_pairs():
    layout = ra.SequenceLayout("contiguous", 256)
    queries = Tokens(layout.shard_positions(3, 8)[None], runs=layout.runs(8))
    keys = Tokens(layout.all_positions(8).reshape(1, -1), runs=layout.all_runs(8))
    with pytest.raises(
        ValueError, match="this kernel would need 511 calls for the ways in which shards of this layout"
    ):
        plan(BlockPair(queries, keys, MaskSpec(scale=1.0)))


def test_plan_of_remote_pairs_has_two_kinds():
    t, mask = 16, MaskSpec(scale=1.0)
    half = t // 2
    for devices in (2, 8, 64):
        local, _ = plan(_pair(ra.SequenceLayout("zigzag", devices), 0, 0, t, mask))
        assert local == [[StaticTile(0, t, 0, t, CAUSAL)]]
        plans, _ = plan(_pair(ra.SequenceLayout("zigzag", devices), 0, 1, t, mask))
        assert sorted(plans) == [[StaticTile(0, t, 0, half, FULL)], [StaticTile(half, half, 0, t, FULL)]]
        plans, _ = plan(_pair(ra.SequenceLayout("striped", devices), 0, 1, t, mask))
        assert sorted(plans) == [[StaticTile(0, t, 0, t, CAUSAL)], [StaticTile(1, t - 1, 0, t - 1, CAUSAL)]]
