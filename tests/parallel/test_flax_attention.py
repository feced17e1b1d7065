"""Flax's attention layers on a ring: the same function as on one device, or an error."""

import copy
import functools
import inspect
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh

import ring_attention as ra
from ring_attention.parallel import flax_attention
from ring_attention.testing import random_segments, relative_error

pytestmark = pytest.mark.usefixtures("plain_kernel")

# Every size is another, so that swapped axes cannot pass. Calls of one shape share a compiled ring.
B, T, M, H, D = 6, 16, 24, 4, 5
ROUNDING = 1e-5
DROPOUT = dict(dropout_rate=0.3, broadcast_dropout=False)


def _mesh(size):
    return ra.make_mesh(sp=size, devices=jax.devices()[:size])


def _random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _nnx(**settings):
    """(parameters, apply(parameters, x, **keywords of the call)) of a layer; the same parameters each time."""
    layer = nnx.MultiHeadAttention(H, M, H * D, use_bias=False, decode=False, rngs=nnx.Rngs(0), **settings)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return params, lambda params, *x, **call: nnx.merge(graph, params, rest)(*x, **call)


def _linen(cls=nn.MultiHeadDotProductAttention, **settings):
    layer = cls(H, qkv_features=H * D, use_bias=False, **settings)
    plain = cls(H, qkv_features=H * D, use_bias=False)
    return plain.init(jax.random.key(0), jnp.zeros((B, T, M))), layer.apply


LAYERS = dict(nnx=_nnx, linen=_linen, linen_alias=functools.partial(_linen, nn.MultiHeadAttention))


def _with_gradients(apply):
    """A function that gives [out, gradient of x, of each parameter...]."""

    @jax.jit
    def run(params, x, cotangent, **call):
        out, vjp = jax.vjp(lambda params, x: apply(params, x, **call), params, x)
        return out, *reversed(vjp(cotangent))

    return lambda *args, **call: jax.tree.leaves(run(*args, **call))


def _errors(got, want):
    return [relative_error(x, y) for x, y in zip(got, want, strict=True)]


# --- The same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "P", "layout", "settings"),
    [
        ("nnx", 4, "contiguous", {}),
        pytest.param("nnx", 8, "zigzag", dict(num_kv_heads=2, normalize_qk=True), marks=pytest.mark.slow),
        ("linen", 2, "zigzag", {}),
    ],
)
def test_flax_layers_give_what_they_give_with_flaxs_attention(name, P, layout, settings):
    build, order = LAYERS[name], ra.SequenceLayout(layout, P)
    x, cotangent = _random(1, B, T, M), _random(2, B, T, M)
    mask = nn.make_causal_mask(x[..., 0])
    params, apply = build(**settings)
    own = _with_gradients(apply)
    want = own(params, x, cotangent, mask=mask)
    assert len(want) == 6 + 2 * settings.get("normalize_qk", False)

    _, apply = build(attention_fn=ra.flax_attention_fn(mesh=_mesh(P), layout=layout), **settings)
    out, dx, *dparams = _with_gradients(apply)(params, order.permute(x, 1), order.permute(cotangent, 1))
    got = [order.unpermute(out, 1), order.unpermute(dx, 1), *dparams]
    assert max(_errors(got, want)) < ROUNDING
    both_ways = own(params, x, cotangent, mask=jnp.ones_like(mask))
    assert min(_errors(got, both_ways)) > 0.1  # the control


def test_flax_attention_fn_windows_are_those_of_flaxs_masks():
    x = _random(1, B, T, M)
    ahead = np.arange(T) - np.arange(T)[:, None]
    (params, apply), wants = _nnx(), {}
    for settings, mask in (((("causal", False),), None), ((("window", 5),), (ahead <= 0) & (ahead > -5))):
        wants[settings] = apply(params, x, mask=mask)
        _, on_ring = _nnx(attention_fn=ra.flax_attention_fn(mesh=_mesh(2), **dict(settings)))
        assert relative_error(on_ring(params, x), wants[settings]) < ROUNDING
    assert relative_error(*wants.values()) > 0.1


def test_flax_attention_fn_folds_axes_as_flax_does():
    (params, apply), (_, on_ring) = _nnx(), _nnx(attention_fn=ra.flax_attention_fn(mesh=_mesh(2)))
    for shape in ((2, 3, T, M), (T, M)):
        x = _random(1, *shape)
        got = on_ring(params, x, is_causal=True)
        assert got.shape == shape
        assert relative_error(got, apply(params, x, is_causal=True)) < ROUNDING
        assert relative_error(got, apply(params, x)) > 0.1


def test_flax_attention_fn_takes_segment_ids_of_the_batch():
    layer = nnx.MultiHeadAttention(H, M, H * D, decode=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    mesh, x = _mesh(2), _random(1, 2, 3, T, M)

    @jax.jit
    def step(state, x, segment_ids):
        layer = nnx.merge(graph, state)
        layer.attention_fn = ra.flax_attention_fn(mesh=mesh, segment_ids=segment_ids)
        return layer(x)

    for seed in (3, 4):
        segment_ids = random_segments(seed, 6, T).reshape(2, 3, T)
        mask = nn.combine_masks(
            nn.make_causal_mask(segment_ids), nn.make_attention_mask(segment_ids, segment_ids, jnp.equal)
        )
        got = step(state, x, segment_ids)
        assert relative_error(got, layer(x, mask=mask)) < ROUNDING
        assert relative_error(got, layer(x, is_causal=True)) > 0.01  # the control: documents that leak


# --- dtype ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_flax_attention_fn_casts_as_flax_does(dtype):
    q, k, v = (_random(seed, B, T, H, D).astype(t) for seed, t in enumerate(("float32", "bfloat16", "bfloat16")))
    got = ra.flax_attention_fn(mesh=_mesh(2))(q, k, v, dtype=dtype)
    want = nnx.dot_product_attention(q, k, v, dtype=dtype, is_causal=True)
    assert got.dtype == want.dtype == (dtype or "float32")
    assert relative_error(got, want) < (1e-2 if dtype == "bfloat16" else ROUNDING)


def test_flax_layer_computes_in_its_dtype():
    x, attention_fn = _random(1, B, T, M), ra.flax_attention_fn(mesh=_mesh(2))
    params, apply = LAYERS["linen_alias"](dtype="bfloat16", force_fp32_for_softmax=True, attention_fn=attention_fn)
    out = apply(params, x)
    assert out.dtype == jnp.bfloat16
    want = _linen()[1](params, x, mask=nn.make_causal_mask(x[..., 0]))
    assert 1e-4 < relative_error(out, want) < 2e-2


# --- Dropout ----------------------------------------------------------------------------------------------------------


def _drop(P, name, layout="contiguous", seed=0, **call):
    """The output of a layer with dropout in natural order, and the keys that its attention function was given."""
    seen = []
    attention_fn = ra.flax_attention_fn(mesh=_mesh(P), layout=layout)

    @functools.wraps(attention_fn)
    def spy(*args, dropout_rng, **kwargs):
        seen.append(dropout_rng)
        return attention_fn(*args, dropout_rng=dropout_rng, **kwargs)

    order = ra.SequenceLayout(layout, P)
    params, apply = LAYERS[name](attention_fn=spy, **DROPOUT)
    rngs = nnx.Rngs(seed) if name == "nnx" else dict(dropout=jax.random.key(seed))
    out = apply(params, order.permute(_random(1, B, T, M), 1), **dict(deterministic=False, rngs=rngs) | call)
    return order.unpermute(out, 1), seen


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_flax_dropout_is_that_of_the_key_on_any_mesh(name):
    first, keys = _drop(2, name)
    assert [(key.shape, jnp.issubdtype(key.dtype, jax.dtypes.prng_key)) for key in keys] == [((), True)]
    np.testing.assert_array_equal(first, _drop(2, name)[0])
    assert relative_error(_drop(4, name, "zigzag")[0], first) < ROUNDING
    assert relative_error(_drop(2, name, seed=1)[0], first) > 0.1  # the control: another key
    undropped, _ = _drop(2, name, deterministic=True)
    params, apply = LAYERS[name]()
    x = _random(1, B, T, M)
    assert relative_error(undropped, apply(params, x, mask=nn.make_causal_mask(x[..., 0]))) < ROUNDING
    assert relative_error(undropped, first) > 0.1


def test_nnx_layer_draws_another_mask_at_each_call():
    attention_fn = ra.flax_attention_fn(mesh=_mesh(2))
    layer = nnx.MultiHeadAttention(H, M, H * D, decode=False, rngs=nnx.Rngs(0), attention_fn=attention_fn, **DROPOUT)
    x = _random(1, B, T, M)
    assert relative_error(layer(x, deterministic=False), layer(x, deterministic=False)) > 0.1


def test_linen_takes_keys_of_the_old_style_too():
    new, _ = _drop(2, "linen", dropout_rng=jax.random.key(7))
    old, (key,) = _drop(2, "linen", dropout_rng=jax.random.PRNGKey(7))
    assert key.dtype == jnp.uint32
    np.testing.assert_array_equal(old, new)


def test_flax_dropout_is_that_of_ring_attention():
    mesh, key = _mesh(2), jax.random.key(5)
    q, k, v = (_random(seed, B, T, H, D) for seed in range(3))
    attention_fn = ra.flax_attention_fn(mesh=mesh)
    got = attention_fn(q, k, v, dropout_rate=0.3, dropout_rng=key, broadcast_dropout=False)
    want = ra.ring_attention(q, k, v, mesh=mesh, dropout_rate=0.3, dropout_key=key)
    np.testing.assert_array_equal(got, want)
    kept = attention_fn(q, k, v, dropout_rate=0.3, dropout_rng=key, deterministic=True)  # broadcast_dropout is True
    assert relative_error(kept, want) > 0.1


# --- What flax_attention_fn takes -------------------------------------------------------------------------------------


SETTINGS = [
    name
    for name, parameter in inspect.signature(ra.context_attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
    and name not in ("mesh", "strategy", "dropout_rate", "dropout_key", "return_lse")
    and name not in ("kv_layout", "kv_positions", "kv_segment_ids")
]
OPTIONS = ["duplex", "unroll"]
OF_TOKENS = ["segment_ids", "intervals", "kv_valid", "kv_bias"]


@pytest.mark.parametrize("name", SETTINGS + OPTIONS)
def test_flax_attention_fn_passes_every_setting_on(name, monkeypatch):
    given = []

    def record(q, k, v, **kwargs):
        given.append(kwargs)
        return q

    monkeypatch.setattr(flax_attention, "context_attention", record)
    mesh, q = _mesh(2), jnp.zeros((B, T, H, D))
    value = jnp.ones((B, T), jnp.int32) if name in OF_TOKENS else True if name in OPTIONS else object()
    ra.flax_attention_fn(mesh=mesh, **{name: value})(q, q, q)
    np.testing.assert_array_equal(given[0].pop(name), value)
    assert given == [dict(mesh=mesh)]


def test_flax_attention_fn_settings_change_the_result():
    mesh = Mesh(np.array(jax.devices()[:2]), ("ring",))
    settings = dict(axis_name="ring", softcap=1.0, scale=3.0, sinks=jnp.ones(H), alibi_slopes=jnp.full(H, 0.2))
    q, k, v = (_random(seed, B, T, H, D) for seed in range(3))
    got = ra.flax_attention_fn(mesh=mesh, **settings)(q, k, v)
    np.testing.assert_array_equal(got, ra.ring_attention(q, k, v, mesh=mesh, **settings))
    assert relative_error(got, nnx.dot_product_attention(q, k, v, is_causal=True)) > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(windw=4),
            "flax_attention_fn got 'windw', which is neither an argument nor an option of 'ring'; its",
        ),
        (dict(mask=None), "flax_attention_fn got 'mask', which is neither"),
        (dict(dropout_rate=0.1), "flax_attention_fn got dropout_rate, but dropout is the layer's; give the layer"),
        (dict(dropout_key=None), "flax_attention_fn got dropout_key, but dropout is the layer's; give the layer"),
    ],
)
def test_flax_attention_fn_refuses_unknown_settings(settings, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        ra.flax_attention_fn(mesh=_mesh(2), **settings)


def test_flax_attention_fn_takes_the_mesh_that_is_set():
    q = jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.float32)
    attention_fn = ra.flax_attention_fn()
    with pytest.raises(ValueError, match="mesh is left out, but none is set"):
        jax.eval_shape(attention_fn, q, q, q)
    with jax.set_mesh(_mesh(2)):
        assert jax.eval_shape(attention_fn, q, q, q).shape == q.shape


def test_flax_attention_fn_is_hashable_and_can_be_pickled():
    sinks = jnp.ones(H)

    def make(**settings):
        return ra.flax_attention_fn(mesh=_mesh(2), layout="zigzag", sinks=sinks, **settings)

    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention_fn, q):
        traced.append(attention_fn)
        return q

    q = jnp.zeros((B, T, H, D))
    for attention_fn in (make(), make(), copy.deepcopy(make()), make(window=3)):
        run(attention_fn, q)
    assert len(traced) == 2
    assert make() == make() != make(causal=False)
    plain = ra.flax_attention_fn(mesh=_mesh(2), window=3)
    assert pickle.loads(pickle.dumps(plain)) == plain


def _valid():
    return jnp.arange(T)[None] < jnp.array([[T], [5]])


@pytest.mark.parametrize(
    ("mask", "call"),
    [
        (nn.make_causal_mask(jnp.ones((2, T))), "causal=True), the default"),
        (nn.make_attention_mask(_valid(), _valid()), "causal=False, segment_ids=valid.astype(int)"),
        (
            nn.combine_masks(nn.make_causal_mask(_valid()), nn.make_attention_mask(_valid(), _valid())),
            "causal=True, segment_ids=valid.astype(int)",
        ),
    ],
)
def test_flax_mask_is_refused_with_the_call_that_replaces_it(mask, call):
    attention_fn, (q, k, v) = ra.flax_attention_fn(mesh=_mesh(2)), (_random(seed, 2, T, H, D) for seed in range(3))
    with pytest.raises(ValueError, match=re.escape(f"is flax_attention_fn({call}")) as error:
        attention_fn(q, k, v, mask=mask)
    assert str(error.value).count("flax_attention_fn") == 1
    settings = dict(causal="causal=True" in call)
    settings |= dict(segment_ids=_valid().astype(int)) if "valid" in call else {}
    seen = (np.diagonal(mask[:, 0], axis1=-2, axis2=-1) if "valid" in call else np.ones((2, T)))[..., None, None]
    got = ra.flax_attention_fn(mesh=_mesh(2), **settings)(q, k, v)
    assert relative_error(got * seen, nnx.dot_product_attention(q, k, v, mask=mask) * seen) < ROUNDING
    with pytest.raises(ValueError, match="make_causal_mask is .*make_attention_mask.* is .*combine_masks .* is "):
        jax.eval_shape(lambda mask: attention_fn(q, k, v, mask=mask), mask)


def test_flax_mask_of_keys_alone_is_honoured():
    q, k, v = (_random(seed, 1, 2, T, H, D) for seed in range(3))
    mask = _valid()[None, :, None, None]
    got = ra.flax_attention_fn(mesh=_mesh(2), causal=False)(q, k, v, mask=mask)
    assert relative_error(got, nnx.dot_product_attention(q, k, v, mask=mask)) < ROUNDING
    assert relative_error(got, nnx.dot_product_attention(q, k, v)) > 0.1  # the control
    intervals = ra.Intervals.chunks(jnp.arange(T)[None].repeat(2, 0), 4, up_to_itself=True)
    told = ra.flax_attention_fn(mesh=_mesh(2), causal=False, intervals=intervals, kv_valid=_valid()[None])
    chunks = jnp.arange(T) // 4
    want = nn.make_causal_mask(q[..., 0, 0]) * (chunks[:, None] == chunks) * mask
    seen = want.any(-1).swapaxes(-1, -2)[..., None]
    assert relative_error(told(q, k, v) * seen, nnx.dot_product_attention(q, k, v, mask=want) * seen) < ROUNDING
    assert hash(told) == hash(ra.flax_attention_fn(mesh=_mesh(2), **told.settings))


# --- What it refuses --------------------------------------------------------------------------------------------------


def test_flax_attention_fn_names_all_that_linen_may_pass():
    """Linen passes only what it finds in the signature, so a name that is missing would be ignored in silence."""
    names = list(inspect.signature(ra.flax_attention_fn(mesh=_mesh(2))).parameters)
    linen = list(inspect.signature(nn.dot_product_attention).parameters)
    assert set(linen) <= set(names)
    of_nnx = list(inspect.signature(nnx.dot_product_attention).parameters)
    assert set(of_nnx) - set(names) == {"promote_dtype"}  # a TypeError from Python, as nnx passes all by name
    assert names[:12] == linen[:12] == of_nnx[:12]  # by position too


X = jnp.zeros((B, T, M))
MASK = nn.make_causal_mask(X[..., 0])
ACTIVE = dict(dropout_rate=0.1, deterministic=False)
HOOKS = dict(qk_attn_weights_einsum_cls=lambda: jnp.einsum, attn_weights_value_einsum_cls=lambda: jnp.einsum)
IN_LAYERS = [
    # layer, made with, called with, attention function made with, message
    (
        ("nnx", "linen"),
        {},
        dict(mask=MASK),
        {},
        "mask has shape (6, 1, 16, 16), but a ring has no place for a mask of queries times keys, and so none for the "
        "cache of decode=True; leave them out: make_causal_mask is flax_attention_fn(causal=True), the default",
    ),
    (
        ("nnx", "linen"),
        {},
        dict(sow_weights=True),
        {},
        "sow_weights=True asks for the attention weights, but a ring never holds them whole; leave sow_weights out",
    ),
    (
        ("nnx", "linen"),
        dict(precision="highest"),
        {},
        {},
        "precision='highest' cannot be set for a ring's products alone; leave precision out of the layer, and run the "
        'whole step under jax.default_matmul_precision("highest")',
    ),
    (("nnx",), dict(precision=lax.Precision.HIGH), {}, {}, "precision=Precision.HIGH cannot be set"),
    (
        ("nnx",),
        ACTIVE,
        dict(rngs=nnx.Rngs(0)),
        {},
        "broadcast_dropout=True with dropout_rate=0.1 drops the same weights in all rows and heads, but a ring drops "
        "others in each; give the layer broadcast_dropout=False",
    ),
    (("linen",), ACTIVE, dict(dropout_rng=jax.random.key(0)), {}, "give the layer broadcast_dropout=False"),
    (
        ("nnx",),
        {},
        dict(is_causal=True),
        dict(causal=False),
        "is_causal=True, but the attention function was made with causal=False; make it with "
        "flax_attention_fn(causal=True)",
    ),
    (
        ("linen",),
        HOOKS,
        {},
        {},
        "qk_attn_weights_einsum is given, but a ring's products are computed inside its kernel; leave it out",
    ),
    (
        ("nnx",),
        {},
        {},
        dict(segment_ids=jnp.ones((B, T - 1), int)),
        "segment_ids has shape (6, 15), need (6, 16), one for each token of the queries",
    ),
    (("linen",), {}, {}, dict(axis_name="ring"), "axis_name='ring' is not an axis of the mesh"),  # ring_attention's own
    (("nnx",), {}, {}, dict(layout="zig"), "layout='zig' is not known"),
]


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "made_with", "called_with", "settings", "message"),
    [(name, *case) for names, *case in IN_LAYERS for name in names],
)
def test_flax_layers_are_refused_what_a_ring_cannot_do(name, made_with, called_with, settings, message):
    params, apply = LAYERS[name](attention_fn=ra.flax_attention_fn(mesh=_mesh(2), **settings), **made_with)
    with pytest.raises(ValueError, match=re.escape(message)):
        apply(params, X, **called_with)
    if not settings:
        params, apply = LAYERS[name](**made_with)  # the control: Flax itself takes it
        assert apply(params, X, **called_with).shape == X.shape


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_flax_cross_attention_is_refused_in_words(name):
    params, apply = LAYERS[name](attention_fn=ra.flax_attention_fn(mesh=_mesh(2)))
    with pytest.raises(ValueError, match="so the 16 queries look at another number of keys.*use Flax's own attention"):
        apply(params, X, X[:, :8])


def test_flax_cache_of_decoding_is_refused():
    attention_fn, x = ra.flax_attention_fn(mesh=_mesh(2)), X[:, :1]
    layer = nnx.MultiHeadAttention(H, M, H * D, decode=True, rngs=nnx.Rngs(0), attention_fn=attention_fn)
    layer.init_cache(X.shape)
    with pytest.raises(ValueError, match=r"mask has shape \(6, 1, 1, 16\).*the cache of decode=True"):
        layer(x)
    layer = nn.MultiHeadDotProductAttention(H, decode=True, attention_fn=attention_fn)
    variables = nn.MultiHeadDotProductAttention(H, decode=True).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"mask has shape \(6, 1, 1, 16\).*the cache of decode=True"):
        layer.apply(variables, x, mutable=["cache"])


Q = jnp.zeros((2, 3, T, H, D))


@pytest.mark.parametrize(
    ("arrays", "kwargs", "message"),
    [
        ((Q, Q, Q, jnp.zeros((T, T))), {}, "bias has shape (16, 16), but a ring has no place for a bias of queries"),
        ((Q, Q, Q), dict(einsum_dot_general=lax.dot_general), "einsum_dot_general is given, but a ring's products"),
        ((Q, Q, Q), dict(attn_weights_value_einsum=jnp.einsum), "attn_weights_value_einsum is given"),
        (
            (Q, Q, Q),
            dict(dropout_rate=0.1, broadcast_dropout=False),
            "dropout_rate=0.1 needs dropout_rng, got None; pass jax.random.key(seed), or deterministic=True",
        ),
        (
            (Q[0, 0, 0], Q[0, 0, 0], Q[0, 0, 0]),
            {},
            "q has shape (4, 5), k (4, 5) and v (4, 5), need as many axes in each, three or more",
        ),
        ((Q, Q[0], Q[0]), {}, "need as many axes in each, three or more: [..., tokens, heads, head_dim]"),
        ((Q, Q.swapaxes(0, 1), Q.swapaxes(0, 1)), {}, "need the same axes before the tokens"),
        ((Q, Q, Q[:, :, :8]), {}, "q has shape (2, 3, 16, 4, 5), k (2, 3, 16, 4, 5) and v (2, 3, 8, 4, 5), so the 16"),
        ((Q, Q[..., :3, :], Q[..., :3, :]), {}, "q has H=4 heads and k has K=3; K must divide H"),
        ((Q, Q, Q), dict(dtype="int32"), "q has dtype int32, need float32, bfloat16 or float16"),
    ],
)
def test_flax_calls_are_refused_what_a_ring_cannot_do(arrays, kwargs, message):
    attention_fn = ra.flax_attention_fn(mesh=_mesh(2))
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_fn(*arrays, **kwargs)


def test_flax_default_precision_is_no_precision():
    attention_fn = ra.flax_attention_fn(mesh=_mesh(2))
    np.testing.assert_array_equal(attention_fn(Q, Q, Q, precision=lax.Precision.DEFAULT), Q)
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(ValueError, match="precision=Precision.DEFAULT cannot be set for a ring's products alone"),
    ):
        attention_fn(Q, Q, Q, precision=lax.Precision.DEFAULT)
