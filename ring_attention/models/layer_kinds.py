"""Layers that differ: what one kind of layer has, and how kinds follow each other in a model."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from ring_attention.checks import require_field
from ring_attention.models.rope import RopeConfig

RUNS = ("run", "rest")
"""How the names of stacks begin where layers are of several kinds: runs of a period, and of what fills no period."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What the attention of some layers has that others lack; None takes what the sections say of all layers.

    Attributes:
      window: a token sees itself and the window-1 tokens before it; 0: all before it. None: `attention.window`.
      chunk: a token sees those before it in its own chunk of so many tokens of the sequence; 0: of any. None:
        `attention.chunk`.
      rope: frequencies of the rotary embedding; with fraction=0 the layer has no positions. None: `model.rope`.
      sinks: each head has a learned logit that takes part in its softmax and has no value. None: `attention.sinks`.
      softcap: scores x become softcap * tanh(x / softcap); 0 leaves them. None: `attention.softcap`.
      local: whether `attention.local_strategy` brings queries and keys together, rather than `attention.strategy`.
        None: it does where the kind has a window or a chunk of its own.
    """

    window: int | None = None
    chunk: int | None = None
    rope: RopeConfig | None = None
    sinks: bool | None = None
    softcap: float | None = None
    local: bool | None = None

    def __post_init__(self):
        for name in ("window", "chunk", "softcap"):
            value = getattr(self, name)
            need, remedy = "must not be negative", "0 leaves it out, and without it the section attention decides"
            require_field(value is None or value >= 0, f"model.layers: {name}", value, need, remedy)

    @property
    def is_local(self) -> bool:
        """Whether its queries and keys are brought together as those of near tokens are."""
        return bool(self.window or self.chunk) if self.local is None else self.local

    @property
    def reach(self) -> int | None:
        """How many tokens a token may see, itself among them; None for no bound."""
        bounds = [bound for bound in (self.window, self.chunk) if bound]
        return min(bounds) if bounds else None

    def completed(self, of_all: "LayerKind") -> "LayerKind":
        """Return this kind with what it leaves open from `of_all`."""
        open_fields = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is None]
        values = {name: getattr(of_all, name) for name in open_fields if name != "local"}
        return dataclasses.replace(self, **values, local=self.is_local)

    def visible_pairs(self, lengths: Iterable[int]) -> int:
        """How many (query, key) pairs causal attention sees in documents of these lengths.

        Chunks are counted from the beginning of each document.
        """
        n = np.asarray(list(lengths), np.int64)
        if self.chunk:
            n = np.concatenate([n % self.chunk, np.repeat(self.chunk, (n // self.chunk).sum())])
        near = np.minimum(n, self.window or n)
        return int((near * (near + 1) // 2 + (n - near) * near).sum())


@dataclasses.dataclass(frozen=True)
class Run:
    """Layers of one kind whose parameters are stacked: those that follow each other, once in each period.

    Attributes:
      path: keys of the stack in the tree of parameters.
      kind: of these layers.
      first: number of the first of them in the model.
      length: how many follow each other.
      periods: how often they do.
      period: layers from one time to the next.
    """

    path: tuple[str, ...]
    kind: LayerKind
    first: int
    length: int
    periods: int = 1
    period: int = 0

    @property
    def name(self) -> str:
        """What the stack is called."""
        return self.path[-1]

    @property
    def count(self) -> int:
        """How many layers the stack holds."""
        return self.length * self.periods

    @property
    def numbers(self) -> list[int]:
        """The number of each layer in the model, in the order of the stack."""
        starts = (self.first + number * self.period for number in range(self.periods))
        return [start + place for start in starts for place in range(self.length)]


@dataclasses.dataclass(frozen=True)
class LayerLoop:
    """How the layers of a model are gone through: a loop over whole periods, then what does not fill another.

    Attributes:
      periodic: runs of a period, in order.
      rest: runs after the last whole period; where all layers are alike, the only run.
    """

    periodic: tuple[Run, ...]
    rest: tuple[Run, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """All stacks of layers."""
        return self.periodic + self.rest

    def run_of(self, path: Sequence[str]) -> Run | None:
        """The run whose stack the parameter at this path is in; None for a parameter of no layer."""
        return next((run for run in self.runs if tuple(path[: len(run.path)]) == run.path), None)

    @staticmethod
    def of(kinds: Sequence[LayerKind], num_layers: int) -> "LayerLoop":
        """The loop of a model of so many layers, in which a period of these kinds is repeated."""
        if len(set(kinds[:num_layers])) == 1:
            return LayerLoop((), (Run(("layers",), kinds[0], 0, num_layers),))
        periods, left = divmod(num_layers, len(kinds))
        periodic = _runs(RUNS[0], kinds, periods, 0) if periods else ()
        return LayerLoop(periodic, _runs(RUNS[1], kinds[:left], 1, periods * len(kinds)))


def _runs(name: str, kinds: Sequence[LayerKind], periods: int, first: int) -> tuple[Run, ...]:
    runs = []
    for kind, same in itertools.groupby(range(len(kinds)), key=kinds.__getitem__):
        places = list(same)
        path = ("layers", f"{name}{len(runs)}")
        runs.append(Run(path, kind, first + places[0], len(places), periods, len(kinds)))
    return tuple(runs)
