"""Context-parallel attention as the `attention_fn` of Flax's attention layers.

Flax gives an attention function more than attention over shards can do. What it cannot do it refuses: an argument that
is dropped in silence gives a model that trains, and is another one than was asked for.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh

from ring_attention.attention.mask_args import defaults_of, lists_arguments
from ring_attention.checks import is_number, require, require_array, shown
from ring_attention.parallel.context import ContextArgs, context_attention
from ring_attention.parallel.flax_arrays import folded, folded_rows, unfolded, validity
from ring_attention.parallel.strategies import find_strategy

_MOST_LOOKED_AT = 2**24
"""Numbers in a mask that is looked at to name the call that replaces it."""

_OF_TOKENS = ("segment_ids", "intervals", "kv_valid", "kv_bias")
"""Settings that are arrays [...,T]."""

_OF_THE_LAYER = ("dropout_rate", "dropout_key")
_NOT_OF_LAYERS = ("return_lse", "kv_layout", "kv_positions", "kv_segment_ids")
_SETTINGS = defaults_of(context_attention, but=("mesh", *_NOT_OF_LAYERS, *_OF_THE_LAYER))


@lists_arguments(_SETTINGS)
def flax_attention_fn(*, mesh: Mesh | AbstractMesh | None = None, **settings: Unpack[ContextArgs]) -> Callable:
    """An `attention_fn` for `flax.nnx.MultiHeadAttention` and for linen's `MultiHead(DotProduct)Attention`.

        attention_fn = ra.flax_attention_fn(mesh=mesh, layout="zigzag")
        layer = nnx.MultiHeadAttention(8, 512, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
        y = layer(x)  # x [B,T,M] in the layout's order, and y too

    It is causal unless told otherwise with `causal=False`, like `context_attention` and unlike Flax, whose layers see
    both ways when they are given no mask. Flax's `is_causal=True` agrees with that; `is_causal=False` is what nnx
    passes if nobody says anything, so it does not change what was said here.

    Of the layer's arguments, these are honoured: `dtype` (q, k and v are cast, as Flax does), `dropout_rate` with the
    layer's key, `deterministic` and `broadcast_dropout=False` (by `context_attention`'s dropout: the same weights on
    any mesh, not those that Flax drops), `num_kv_heads`, `force_fp32_for_softmax` (it always is). Any number of axes
    may stand before the tokens: they are folded into one batch axis, whose size the batch axes of the mesh must divide.
    Keys may come from another sequence only if it is as long as that of the queries.

    A `mask` [...,1,1,T], which says of each key alone whether it is seen, is honoured as `kv_valid`.

    Arrays among the settings (`segment_ids`, `kv_valid`, `sinks`, ...) are the same for every call. For those that come
    with the batch, make the function where they are known: inside the step, where a linen layer is made anyway,
    and an nnx layer after `nnx.merge` takes `layer.attention_fn = ra.flax_attention_fn(mesh=mesh, segment_ids=ids)`.

    Args:
      mesh: the devices of the ring; by default those that `jax.set_mesh` has set when the layer is called.
      **settings: the other keyword arguments of `context_attention`, all but its dropout, its lse and what it takes for
        keys of another sequence: strategy and its options, axis_name, spec (of the arrays with one batch axis), layout,
        positions, causal, window, segment_ids, intervals, kv_valid, kv_lengths, kv_bias, max_segment_len, softcap,
        scale, sinks, alibi_slopes, extra_mask, impl, block_sizes. segment_ids, each array of intervals, kv_valid and
        kv_bias have the shape of the layer's input without its last axis.

    Returns:
      A function, equal to others made with the same, that can be pickled and deep-copied. Flax's layers call it with q
      [...,T,H,D], k and v [...,T,K,D] and keywords. It raises ValueError, before anything compiles, for what it cannot
      honour: any other `mask` (naming the call that replaces it) and with it the cache of `decode=True`, `bias`,
      `sow_weights`, `broadcast_dropout=True` (Flax's default) while dropout is active, a `precision`, an einsum of the
      layer's own, `is_causal=True` against `causal=False`, keys of another length than the queries.

    Raises:
      TypeError: for a setting that `context_attention` does not have, or that belongs to the layer.
    """
    given = dict(settings)
    _check_settings(given)
    return _AttentionFunction(mesh, given)


@dataclasses.dataclass(frozen=True, eq=False)
class _AttentionFunction:
    """What `flax_attention_fn` returns: equal, and one program for jit, where mesh and settings are.

    Arrays among the settings are equal if they are the same object. A copy is the function itself, and a pickled one
    looks for its devices by their numbers.
    """

    mesh: Mesh | AbstractMesh | None
    settings: dict

    # Each argument has a name, because linen drops in silence those that it does not find in the signature.
    def __call__(
        self,
        query,
        key,
        value,
        bias=None,
        mask=None,
        broadcast_dropout=True,
        dropout_rng=None,
        dropout_rate=0.0,
        deterministic=False,
        dtype=None,
        precision=None,
        module=None,
        *,
        force_fp32_for_softmax=False,
        einsum_dot_general=None,
        qk_attn_weights_einsum=None,
        attn_weights_value_einsum=None,
        is_causal=False,
    ):
        del force_fp32_for_softmax  # every kernel's softmax is float32
        settings = dict(self.settings)
        causal, segment_ids = settings.get("causal", _SETTINGS["causal"]), settings.get("segment_ids")
        _refuse_masks(None if (valid := validity(mask, query, key)) is not None else mask, bias)
        require(
            causal or not is_causal,
            "is_causal=True, but the attention function was made with causal=False; make it with "
            "flax_attention_fn(causal=True)",
        )
        require(
            module is None,
            "sow_weights=True asks for the attention weights, but a ring never holds them whole; leave sow_weights out",
        )
        _refuse_arithmetic(
            precision,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        dropout = _dropout_of(dropout_rate, dropout_rng, broadcast_dropout, deterministic)
        _check_shapes(query, key, value, segment_ids)

        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        q_BTHD, k_BTKD, v_BTKD = (folded(jnp.asarray(x, dtype), 3) for x in (query, key, value))
        if valid is not None:
            settings["kv_valid"] = valid if settings.get("kv_valid") is None else valid & settings["kv_valid"]
        settings |= {name: folded_rows(settings[name]) for name in _OF_TOKENS if settings.get(name) is not None}
        out_BTHD = context_attention(q_BTHD, k_BTKD, v_BTKD, mesh=self.mesh, **settings, **dropout)
        return unfolded(out_BTHD, query)

    def _key(self):
        return self.mesh, frozenset((name, _hashable(value)) for name, value in self.settings.items())

    def __eq__(self, other):
        return isinstance(other, _AttentionFunction) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        if not isinstance(self.mesh, Mesh):
            return _AttentionFunction, (self.mesh, self.settings)
        mesh, numbers = self.mesh, np.vectorize(lambda device: device.id, otypes=[int])(self.mesh.devices)
        platform = mesh.devices.flat[0].platform
        return _unpickled, (platform, numbers, mesh.axis_names, mesh.axis_types, self.settings)


def _hashable(value):
    """The value, or its identity if it is an array or something else that cannot be a key."""
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    return value if isinstance(value, Hashable) and not hasattr(value, "dtype") else id(value)


def _unpickled(platform: str, numbers: np.ndarray, axis_names, axis_types, settings: dict) -> _AttentionFunction:
    devices = {device.id: device for device in jax.devices(platform)}
    missing = sorted(set(numbers.flat) - set(devices))
    require(
        not missing,
        f"an attention function was pickled for devices {numbers.ravel().tolist()}, but there are no {missing} here; "
        "make it anew with flax_attention_fn(mesh=...)",
    )
    mesh = Mesh(np.vectorize(devices.__getitem__, otypes=[object])(numbers), axis_names, axis_types=axis_types)
    return _AttentionFunction(mesh, settings)


def _check_settings(settings: dict) -> None:
    """Raise TypeError unless flax_attention_fn takes every one of these."""
    for name in settings:
        if name in _OF_THE_LAYER:
            raise TypeError(
                f"flax_attention_fn got {name}, but dropout is the layer's; "
                "give the layer dropout_rate, broadcast_dropout=False and a dropout key"
            )
    options = {name: value for name, value in settings.items() if name not in _SETTINGS}
    try:
        find_strategy(settings.get("strategy", _SETTINGS["strategy"]), options)
    except TypeError as error:
        raise TypeError(f"flax_attention_fn {error}; its settings are {', '.join(_SETTINGS)}") from None


def _refuse_masks(mask, bias) -> None:
    if mask is not None:
        raise ValueError(
            f"mask {_described(mask)}, but a ring has no place for a mask of queries times keys, and so none "
            f"for the cache of decode=True; leave them out: {_replacement(mask)}"
        )
    if bias is not None:
        raise ValueError(
            f"bias {_described(bias)}, but a ring has no place for a bias of queries times keys; "
            "leave it out, or use flax_attention_fn(alibi_slopes=...) if it grows with distance"
        )


def _described(x) -> str:
    return f"has shape {x.shape}" if hasattr(x, "shape") else f"is {shown(x)}"


def _replacement(mask) -> str:
    """Which call says the same as a mask of Flax's helpers; all of them where its values are not known yet."""
    causal = "make_causal_mask is flax_attention_fn(causal=True), the default"
    valid = "segment_ids=valid.astype(int), valid [B,T] being what make_attention_mask was given"
    both = f"combine_masks of that and a causal one is flax_attention_fn(causal=True, {valid})"
    padding = f"make_attention_mask(valid, valid) is flax_attention_fn(causal=False, {valid})"
    known = hasattr(mask, "shape") and not isinstance(mask, Tracer)
    if known and len(mask.shape) >= 2 and mask.shape[-1] == mask.shape[-2] and mask.size <= _MOST_LOOKED_AT:
        seen = np.asarray(mask, bool)
        real, lower = np.diagonal(seen, axis1=-2, axis2=-1), np.tri(seen.shape[-1], dtype=bool)
        pairs = real[..., :, None] & real[..., None, :]
        for same, words in ((lower, causal), (pairs, padding), (pairs & lower, both)):
            if (seen == same).all():
                return words
    return f"{causal}; {padding}; {both}; window=... is for masks of neighbours"


def _refuse_arithmetic(precision, **hooks) -> None:
    # JAX's own default is what a ring computes in, and may be set to something else for the whole program.
    set_to = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    require(
        precision is None or (precision in (lax.Precision.DEFAULT, "default") and set_to is None),
        f"precision={precision!r} cannot be set for a ring's products alone; leave precision out of the layer, "
        'and run the whole step under jax.default_matmul_precision("highest") or another',
    )
    inside = "is given, but a ring's products are computed inside its kernel; leave it out of the layer"
    for name, hook in hooks.items():
        require(hook is None, f"{name} {inside}")


def _dropout_of(rate, rng, broadcast: bool, deterministic: bool) -> dict:
    """The dropout of a call, as context_attention takes it; raises ValueError for another kind."""
    need = "must be a number of at least 0 and less than 1; 0 leaves dropout out"
    require(is_number(rate), f"dropout_rate={shown(rate)} {need}")
    if not rate > 0 or deterministic:
        return {}
    require(
        not broadcast,
        f"broadcast_dropout=True with dropout_rate={rate!r} drops the same weights in all rows and heads, but a ring "
        "drops others in each; give the layer broadcast_dropout=False",
    )
    require(
        rng is not None,
        f"dropout_rate={rate!r} needs dropout_rng, got None; pass jax.random.key(seed), or deterministic=True",
    )
    return dict(dropout_rate=rate, dropout_key=rng)


def _check_shapes(query, key, value, segment_ids) -> None:
    """What folding the leading axes would hide, and what needs Flax's words; context_attention checks the rest."""
    for name, x in (("q", query), ("k", key), ("v", value)):
        require_array(name, x)
    shapes = f"q has shape {query.shape}, k {key.shape} and v {value.shape}"
    require(
        query.ndim == key.ndim == value.ndim and query.ndim >= 3,
        f"{shapes}, need as many axes in each, three or more: [..., tokens, heads, head_dim]; reshape them",
    )
    require(
        query.shape[:-3] == key.shape[:-3] == value.shape[:-3],
        f"{shapes}, need the same axes before the tokens; repeat or reshape the inputs before the layer",
    )
    require(
        query.shape[-3] == key.shape[-3] == value.shape[-3],
        f"{shapes}, so the {query.shape[-3]} queries look at another number of keys, but a ring needs as many; "
        "use Flax's own attention for cross attention and for a cache",
    )
    if segment_ids is not None:
        require_array("segment_ids", segment_ids)
        require(
            segment_ids.shape == query.shape[:-2],
            f"segment_ids has shape {segment_ids.shape}, need {query.shape[:-2]}, one for each token of the queries; "
            "make flax_attention_fn with those of this batch",
        )
