import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.models.config import ModelConfig
from ring_attention.models.products import Stationary
from ring_attention.models.transformer import Transformer, parameter_specs, resized_parameters
from ring_attention.planning.hlo.compiled import collectives
from ring_attention.testing import relative_error
from ring_attention.training.attend import attention_of
from ring_attention.training.config import AttentionConfig

TINY = ModelConfig(
    vocab_size=40, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=24, ffn_chunk=5
)
HEADS = dict(num_kv_heads=4, head_groups=2)
METHODS = dict(hidden=jnp.bfloat16, logits=jnp.float32)
LENGTH = 32
DOCUMENTS = np.repeat(np.array([[1, 2, 3]], np.int32), [13, 5, 14], axis=1)
POSITIONS = np.concatenate([np.arange(13), np.arange(5), np.arange(14)])[None].astype(np.int32)
TOKENS = np.random.default_rng(0).integers(0, 40, (1, LENGTH)).astype(np.int32)


def _parameters(config):
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(0)), nnx.Param))


def _on_mesh(config, mesh, method, layout="zigzag"):
    """`fn(params, tokens, ...)` that calls a method of the Transformer; everything in natural order."""
    layout = ra.SequenceLayout(layout, mesh.shape["sp"])
    config = AttentionConfig().completed(config)
    attend = attention_of(AttentionConfig(layout=layout.kind), config, mesh.shape["sp"])
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    tokens = Spec(("dp", "fsdp"), "sp")

    def on_device(params, positions, segment_ids, *arrays):
        model = nnx.merge(graph, params)
        return getattr(model, method)(*arrays, positions=positions, segment_ids=segment_ids, attend=attend)

    def fn(params, *arrays):
        sharded = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(parameter_specs(config), *(tokens,) * (2 + len(arrays))),
            out_specs=Spec(*tokens, "tp") if method == "logits" else tokens,
        )
        dealt = (layout.permute(jnp.asarray(x), 1) for x in (POSITIONS, DOCUMENTS, *arrays))
        return layout.unpermute(sharded(params, *dealt), 1)

    return jax.jit(fn)


VARIANTS = dict(
    plain={}, tied=dict(tied_embeddings=True), biased=dict(qkv_bias=True), normed=dict(qk_norm=True)
) | dict(all=dict(tied_embeddings=True, qkv_bias=True, qk_norm=True, num_kv_heads=1))
COMPILED = dict(plain=VARIANTS["plain"], all=VARIANTS["all"])


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_num_parameters_is_the_number_of_parameters(change):
    config = dataclasses.replace(TINY, **{"num_kv_heads": 4, "num_layers": 3} | change)
    shapes = jax.tree.leaves(jax.eval_shape(lambda: _parameters(config)))
    assert sum(x.size for x in shapes) == config.num_parameters
    assert {x.dtype for x in shapes} == {jnp.dtype("float32")}
    assert sum(x.size for x in shapes) != TINY.num_parameters


def test_specs_shard_every_matrix_over_the_ring_and_replicate_norms():
    config = dataclasses.replace(TINY, qkv_bias=True, qk_norm=True)
    specs = parameter_specs(config)
    assert specs["embed"] == Spec("tp", ("fsdp", "sp")) or specs["embed"] == Spec(("tp",), ("fsdp", "sp"))
    shapes = jax.eval_shape(lambda: _parameters(config))
    for (path, spec), shape in zip(
        jax.tree.leaves_with_path(specs, is_leaf=lambda x: isinstance(x, Spec)), jax.tree.leaves(shapes), strict=True
    ):
        assert len(spec) <= len(shape.shape)
        small = "norm" in str(path) or "bias" in str(path)
        assert small != any(entry and "sp" in entry for entry in spec)


def test_a_token_changes_the_logits_of_later_tokens_of_its_document_only():
    params = _parameters(TINY)
    logits = jax.jit(_on_mesh(TINY, ra.make_mesh(sp=4, tp=2), "logits"))
    before = np.asarray(logits(params, TOKENS))
    assert before.shape == (1, LENGTH, 40)
    for token in (0, 12, 13, 20, 31):
        tokens = TOKENS.copy()
        tokens[0, token] = (tokens[0, token] + 1) % 40
        changed = (np.asarray(logits(params, tokens)) != before).any(axis=(0, 2))
        reached = (np.arange(LENGTH) >= token) & (DOCUMENTS[0] == DOCUMENTS[0, token])
        np.testing.assert_array_equal(changed, reached)
    # and it is the same function on one device, so that nothing that should be seen is lost
    alone = jax.jit(_on_mesh(TINY, ra.make_mesh(devices=jax.devices()[:1]), "logits"))
    assert relative_error(before, alone(params, TOKENS)) < 1e-5
    assert relative_error(alone(params, (TOKENS + 1) % 40), before) > 0.1  # the control: other tokens


def _gradients(config):
    """Losses and gradients of the parameters, for a random weight of each token."""
    weights = np.random.default_rng(1).standard_normal((1, LENGTH)).astype(np.float32)
    losses = _on_mesh(config, ra.make_mesh(sp=2, tp=2, devices=jax.devices()[:4]), "token_losses")

    @jax.jit
    def run(params):
        nats, vjp = jax.vjp(lambda params: losses(params, TOKENS, np.roll(TOKENS, -1, 1)), params)
        return nats, vjp(jnp.asarray(weights))[0]

    return run(_parameters(config))


@pytest.fixture(scope="module")
def kept():
    """Losses and gradients where every activation is kept."""
    return _gradients(dataclasses.replace(TINY, remat="none"))


@pytest.mark.parametrize(
    "remat", ["attention", *(pytest.param(x, marks=pytest.mark.slow) for x in ("offload", "full", "offload_input"))]
)
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(remat, kept):
    got = _gradients(dataclasses.replace(TINY, remat=remat))
    jax.tree.map(lambda g, w: np.testing.assert_array_less(relative_error(g, w), 1e-5), got, kept)
    smallest = min(float(jnp.linalg.norm(g)) for g in jax.tree.leaves(kept))
    assert smallest > 1e-3  # the control: no gradient is zero, so that zeros would not pass


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["offload", pytest.param("none", marks=pytest.mark.nightly)])
def test_attention_of_some_heads_at_a_time_is_that_of_all(remat, kept):
    got = _gradients(dataclasses.replace(TINY, remat=remat, **HEADS))
    want = _gradients(dataclasses.replace(TINY, remat="none", **{**HEADS, "head_groups": 1}))
    jax.tree.map(lambda g, w: np.testing.assert_array_less(relative_error(g, w), 1e-5), got, want)
    assert relative_error(got[0], kept[0]) > 1e-4  # the control: another model has other losses


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_and_gradients_in_float32(kept):
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    nats, grads = _gradients(config)
    assert nats.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    distances = jax.tree.leaves(jax.tree.map(relative_error, grads, kept[1]))
    assert max(distances) < 0.1
    assert min(distances) > 1e-4  # the control: float32 arithmetic would be closer


def test_hidden_states_are_in_the_compute_dtype_and_logits_in_float32():
    config, mesh = dataclasses.replace(TINY, compute_dtype="bfloat16"), ra.make_mesh(sp=4, tp=2)
    dtypes = {m: jax.eval_shape(_on_mesh(config, mesh, m), _parameters(config), TOKENS).dtype for m in METHODS}
    assert dtypes == METHODS


def _random_parameters(config):
    """Parameters none of which is 0 or 1, so that each matters."""
    leaves, tree = jax.tree.flatten(_parameters(config))
    rng = np.random.default_rng(3)
    return tree.unflatten([x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])


def _dense_logits(config, params, tokens, positions):
    """The same function written down plainly, in float64 on one device, for one document."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rms = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale  # noqa: E731
    angles = positions[:, None] * config.rope.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)

    def turn(x):  # [T, heads, D]
        first, second = np.split(x, 2, axis=-1)
        turned = (first + 1j * second) * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = p["embed"][tokens]
    for layer in range(config.num_layers):
        w = jax.tree.map(lambda a, layer=layer: a[layer], p["layers"])
        a = w["attention"]
        h = rms(x, w["attention_norm"]["scale"])
        q, k, v = (np.einsum("tm,mhd->thd", h, a[name]) for name in ("query", "key", "value"))
        if config.qkv_bias:
            q, k, v = q + a["query_bias"], k + a["key_bias"], v + a["value_bias"]
        if config.qk_norm:
            q, k = rms(q, a["query_norm"]["scale"]), rms(k, a["key_norm"]["scale"])
        out = ra.reference_attention(turn(q)[None], turn(k)[None], v[None], causal=True)[0]
        x = x + np.einsum("thd,hdm->tm", out, a["out"])
        h = rms(x, w["feedforward_norm"]["scale"])
        gate = h @ w["feedforward"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["feedforward"]["up"])) @ w["feedforward"]["down"]
    unembed = p["embed"].T if config.tied_embeddings else p["unembed"]
    return rms(x, p["norm"]["scale"]) @ unembed


@pytest.mark.parametrize("change", COMPILED.values(), ids=COMPILED)
def test_every_variant_is_the_function_written_down_plainly(change):
    config = dataclasses.replace(TINY, **{"num_kv_heads": 2} | change)
    mesh = ra.make_mesh(sp=4, tp=2) if config.num_kv_heads > 1 else ra.make_mesh(sp=8)
    params, last = _random_parameters(config), DOCUMENTS[0] == 3
    got = np.asarray(_on_mesh(config, mesh, "logits")(params, TOKENS))
    want = _dense_logits(config, params, TOKENS[0][last], POSITIONS[0][last])
    assert relative_error(got[0][last], want) < 1e-5
    for name in ("query_bias", "key_norm"):  # the control: each part counts
        if name in params["layers"]["attention"]:
            less = jax.tree.map(lambda x: x, params)
            less["layers"]["attention"][name] = jax.tree.map(lambda x: x * 0 + 1, less["layers"]["attention"][name])
            assert relative_error(_dense_logits(config, less, TOKENS[0][last], POSITIONS[0][last]), want) > 1e-2


def _stationary_logits(config, mesh):
    """`fn(params, tokens)`: logits of the same tokens on every device of a ring, whose weights stay where they are."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))

    def attend(q, k, v, this, cache, run, place):
        return ra.blockwise_attention(q, k, v), None

    def on_device(params, tokens):
        model, T = nnx.merge(graph, params), tokens.shape[1]
        options = dict(
            positions=jnp.arange(T)[None], length=T, cache=None, attend=attend, products=Stationary(config.model_dim)
        )
        hidden, _ = model.with_cache(tokens, **options)
        return model.logits_of(hidden, Stationary(config.model_dim))

    specs = dict(in_specs=(parameter_specs(config), Spec("dp")), out_specs=Spec("dp", None, "tp"))
    return jax.jit(jax.shard_map(on_device, mesh=mesh, **specs))


@pytest.mark.parametrize("change", COMPILED.values(), ids=COMPILED)
def test_weights_that_stay_where_they_are_compute_the_same(change):
    config = dataclasses.replace(TINY, **{"num_kv_heads": 2} | change)
    mesh = ra.make_mesh(sp=3, tp=2, devices=jax.devices()[:6]) if config.num_kv_heads > 1 else ra.make_mesh(sp=8)
    params = _random_parameters(config)
    stored = resized_parameters(params, config, mesh.shape)
    assert stored["embed"].shape[1] == (18 if mesh.shape["sp"] == 3 else 16)
    logits = _stationary_logits(config, mesh)(stored, TOKENS[:, :5])
    want = _dense_logits(config, params, TOKENS[0, :5], np.arange(5))
    assert relative_error(logits[0], want) < 1e-5
    assert relative_error(logits[0], np.roll(want, 1, axis=0)) > 0.1  # the control


def test_weights_that_stay_where_they_are_are_not_gathered():
    mesh = ra.make_mesh(sp=4, tp=2)
    program = _stationary_logits(TINY, mesh).lower(_parameters(TINY), TOKENS[:, :1]).compile()
    moved = collectives(program.as_text())
    largest = max(array.bytes for collective in moved for array in collective.arrays)
    assert {collective.kind for collective in moved} == {"all-gather", "all-reduce"}
    assert largest == 4 * 2 * TINY.ffn_dim // 2  # what gate and up make of one token, on one of two devices of tp
