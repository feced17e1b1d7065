"""The arguments by which every attention of this package says what a query sees: declared once, shown everywhere.

A public function takes them as `**arguments: Unpack[MaskArgs]`, so editors know them. `lists_arguments` makes `help`
and `inspect.signature` show each of them with its default.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar, get_args, get_type_hints

import jax

from ring_attention.attention.mask import Mask

_Function = TypeVar("_Function", bound=Callable)


class ScoreArgs(TypedDict, total=False):
    """Keyword arguments of every attention, that to a cache included; docstrings of the functions describe them."""

    window: int | None
    softcap: float | None
    scale: float | jax.Array | None
    sinks: jax.Array | None
    alibi_slopes: jax.Array | None
    extra_mask: Mask | None


class MaskArgs(ScoreArgs, total=False):
    """Keyword arguments of every attention of a whole sequence."""

    causal: bool
    segment_ids: jax.Array | None
    dropout_rate: float
    dropout_key: jax.Array | None


MASK_DEFAULTS: dict[str, Any] = dict(
    causal=True,
    window=None,
    segment_ids=None,
    softcap=None,
    scale=None,
    sinks=None,
    alibi_slopes=None,
    dropout_rate=0.0,
    dropout_key=None,
    extra_mask=None,
)
"""The default of each argument in `MaskArgs`, in the order in which signatures list them."""


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
    """Raise TypeError, as Python does, for a keyword argument that the signature of `function` does not show."""
    for name in arguments:
        if name not in inspect.signature(function).parameters:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
