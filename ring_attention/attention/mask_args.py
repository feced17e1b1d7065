"""The arguments by which every attention of this package says what a query sees: declared once, shown everywhere.

A public function takes them as `**arguments: Unpack[MaskArgs]`, so editors know them. `lists_arguments` makes `help`
and `inspect.signature` show each of them with its default.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar, get_args, get_type_hints

import jax

from ring_attention.attention.intervals import Intervals
from ring_attention.attention.mask import Mask

_Function = TypeVar("_Function", bound=Callable)

Window = int | tuple[int | None, int | None] | None
"""How far a query sees: less than so many tokens, or (so many before, so many after it)."""


class ScoreArgs(TypedDict, total=False):
    """Keyword arguments of every attention, that to a cache included; docstrings of the functions describe them."""

    window: Window
    softcap: float | None
    scale: float | jax.Array | None
    sinks: jax.Array | None
    alibi_slopes: jax.Array | None
    extra_mask: Mask | None


class MaskArgs(ScoreArgs, total=False):
    """Keyword arguments of every attention of a whole sequence."""

    causal: bool
    segment_ids: jax.Array | None
    intervals: Intervals | tuple[jax.Array, jax.Array] | None
    kv_valid: jax.Array | None
    kv_lengths: jax.Array | None
    kv_bias: jax.Array | None
    dropout_rate: float
    dropout_key: jax.Array | None


MASK_DEFAULTS: dict[str, Any] = dict(
    causal=True,
    window=None,
    segment_ids=None,
    intervals=None,
    kv_valid=None,
    kv_lengths=None,
    kv_bias=None,
    softcap=None,
    scale=None,
    sinks=None,
    alibi_slopes=None,
    dropout_rate=0.0,
    dropout_key=None,
    extra_mask=None,
)
"""The default of each argument in `MaskArgs`, in the order in which signatures list them."""

_SEQUENCES = "segment_ids (and kv_segment_ids) for packed sequences"
_MASK_WORDS = (
    "no array of all pairs is taken, which would grow with the square of the length: causal=, window=, segment_ids=, "
    "intervals=(start, stop) and kv_valid= say which keys a query sees, extra_mask= any function of positions"
)
_BIAS_WORDS = "kv_bias= adds a number for each key, alibi_slopes= one for each position of distance"
OTHER_NAMES = {
    **dict.fromkeys(("mask", "attn_mask", "attention_mask", "mod", "mask_mod", "block_mask"), _MASK_WORDS),
    **dict.fromkeys(("bias", "attn_bias", "ab", "score_mod", "attention_bias"), _BIAS_WORDS),
    **dict.fromkeys(
        ("key_padding_mask", "kv_mask", "key_mask", "padding_mask"), "kv_valid= takes it, True where a key is real"
    ),
    **dict.fromkeys(
        ("key_value_seq_lengths", "kv_seqlens", "kv_seq_lengths", "key_lengths"), "kv_lengths= takes them, one each row"
    ),
    **dict.fromkeys(
        ("query_seq_lengths", "q_seqlens"),
        "leave it out: what a padded query gives is of no use to the others, so leave it out of the loss; kv_lengths= "
        "hides padded keys",
    ),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "seqlens"), _SEQUENCES + ": number them 0, 0, 1, 1, 1, ..."),
    **dict.fromkeys(("q_segment_ids", "decoder_segment_ids"), _SEQUENCES),
    **dict.fromkeys(
        ("return_residual", "save_residuals", "return_softmax_lse", "return_attn_probs"),
        "return_lse=True also returns the lse",
    ),
    **dict.fromkeys(
        ("local_window_size", "window_size", "sliding_window", "sliding_window_size"),
        "window=(left, right) takes so many tokens before and after a query; window=W is W-1, and those after unless "
        "causal",
    ),
    **dict.fromkeys(("is_causal", "causal_mask"), "causal= says it, and is True by default"),
    **dict.fromkeys(("sm_scale", "softmax_scale"), "scale= is that of the products"),
    **dict.fromkeys(("logits_soft_cap", "logit_cap", "attn_logits_soft_cap", "logits_softcap"), "softcap= caps scores"),
    **dict.fromkeys(("dropout_p", "dropout", "dropout_rng"), "dropout_rate= and dropout_key= drop weights"),
    **dict.fromkeys(("implementation", "backend", "kernel"), "impl= names a kernel"),
    **dict.fromkeys(("chunk", "chunk_size"), "intervals= says which positions a query sees (`ra.Intervals.chunks`)"),
}
"""What others call an argument -> the argument that does it here, in words."""


def defaults_of(function: Callable, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """Names and defaults of the keyword-only arguments that `function` shows, without those named in `but`."""
    parameters = inspect.signature(function).parameters.values()
    return {x.name: x.default for x in parameters if x.kind is x.KEYWORD_ONLY and x.name not in but}


def lists_arguments(defaults: Mapping[str, Any]) -> Callable[[_Function], _Function]:
    """A decorator that lists, in a function's signature, what `**arguments: Unpack[SomeTypedDict]` stands for.

    Args:
      defaults: of the keys of the TypedDict, in the order in which they are listed; if it has other keys, `**options`
        stands for these.
    """

    def listed(function: _Function) -> _Function:
        signature = inspect.signature(function)
        *named, rest = signature.parameters.values()
        kinds = get_type_hints(get_args(rest.annotation)[0])
        shown = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
            for name, default in defaults.items()
            if name in kinds and name not in signature.parameters
        ]
        options = [rest.replace(name="options", annotation=Any)] if kinds.keys() - defaults.keys() else []
        function.__signature__ = signature.replace(parameters=[*named, *shown, *options])
        return function

    return listed


def refuse_unknown(function: Callable, arguments: Mapping[str, Any]) -> None:
    """Raise TypeError, as Python does, for a keyword argument that the signature of `function` does not show.

    It says which argument does what other libraries give one of this name for.
    """
    for name in arguments:
        if name not in inspect.signature(function).parameters:
            message = f"{function.__name__}() got an unexpected keyword argument {name!r}"
            raise TypeError(message + instead_of(name, function))


def instead_of(name: str, function: Callable) -> str:
    """Words on the arguments of `function` that do what others call `name`; empty where it has none of them."""
    words, parameters = OTHER_NAMES.get(name, ""), inspect.signature(function).parameters
    named = re.findall(r"(\w+)=", words)
    return f"; {words}" if words and any(argument in parameters for argument in named) else ""
