"""The strategies by name."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from types import MappingProxyType
from typing import TypedDict

from ring_attention.attention.mask_args import instead_of
from ring_attention.checks import is_whole, require, require_choice, shown
from ring_attention.parallel.all_gather import AllGather
from ring_attention.parallel.ring import Ring, SingleDevice, SlidingWindow
from ring_attention.parallel.ring_self_attention import RingSelfAttention
from ring_attention.parallel.sparse import Sparse
from ring_attention.parallel.strategy import Strategy
from ring_attention.parallel.ulysses import Ulysses, Usp
from ring_attention.parallel.workload import Workload

STRATEGIES = MappingProxyType(
    {
        strategy.name: strategy
        for strategy in (
            SingleDevice(),
            AllGather(),
            Sparse(),
            SlidingWindow(),
            RingSelfAttention(),
            Ring(),
            Ulysses(),
            Usp(),
        )
    }
)
"""Name -> strategy with its default options, and the facts about it."""


class StrategyOptions(TypedDict, total=False):
    """Options of the strategies in `STRATEGIES`; their classes describe them."""

    duplex: bool
    unroll: bool
    head_groups: int | None
    ulysses_size: int | None
    stride: int | None


def find_strategy(strategy: str | Strategy, options: dict | None = None, function: Callable | None = None) -> Strategy:
    """The strategy of this name with these options, or the one given.

    `function` is the one that was given the options, whose arguments an error then names, too.

    Raises:
      ValueError: for a name that is not known, or an option of another kind.
      TypeError: for an option that the strategy does not have.
    """
    if not isinstance(strategy, Strategy):
        require_choice("strategy", strategy, STRATEGIES)
        strategy = STRATEGIES[strategy]
    known = [field.name for field in dataclasses.fields(strategy) if field.init]
    for name in options or {}:
        if name not in known:
            takes = f"its options are {', '.join(known)}" if known else "it has no options"
            takes += _suggestion(name, known, function)
            raise TypeError(f"got {name!r}, which is neither an argument nor an option of {strategy.name!r}; {takes}")
    strategy = dataclasses.replace(strategy, **options) if options else strategy
    _check_options(strategy)
    return strategy


def scheduled(work: Workload) -> list[str]:
    """The names of the strategies whose schedule for this work is known."""
    return [name for name, strategy in STRATEGIES.items() if strategy.schedule(work)]


def _suggestion(name: str, known: list[str], function: Callable | None) -> str:
    """The name that was meant, or else all arguments that the function has."""
    if function is None:
        return ""
    parameters = inspect.signature(function).parameters.values()
    if words := instead_of(name, function):
        return words
    arguments = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    close = difflib.get_close_matches(name, [*known, *arguments], n=1)
    if close:
        return f"; did you mean {close[0]}=?"
    return f"; the arguments of {function.__name__} are {', '.join(arguments)}"


def _check_options(strategy: Strategy) -> None:
    """Raise ValueError unless switches are True or False, and numbers None or positive."""
    for field in dataclasses.fields(strategy):
        value, fits, need = getattr(strategy, field.name), True, ""
        if field.type is bool:
            fits, need = isinstance(value, bool), "True or False"
        elif field.type == int | None:
            fits, need = value is None or is_whole(value, 1), "a whole number, 1 or more"
        got = f"{field.name}={shown(value)} of strategy={strategy.name!r}"
        require(fits, f"{got} must be {need}; leave it out for the default")
