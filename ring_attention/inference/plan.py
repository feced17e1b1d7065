"""What the programs of generation are compiled for, and whether it fits together."""

import dataclasses
import functools

from jax.sharding import Mesh

from ring_attention.checks import is_whole, require, shown
from ring_attention.inference.sampling import Sampling
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import Run
from ring_attention.parallel.layouts import MOST_TOKENS, SequenceLayout
from ring_attention.parallel.mesh import AXES, FSDP, SEQUENCE, TENSOR
from ring_attention.parallel.sharding import check_fits
from ring_attention.parallel.strategies import STRATEGIES
from ring_attention.training.attend import check_kinds, reach_of, strategies_of
from ring_attention.training.config import AttentionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static facts that the programs of generation are compiled for.

    Attributes:
      model: its shape.
      attention: its attention; the layout is striped.
      capacity: tokens of a row, which the rotary scalings "dynamic" and "longrope" go by.
      sampling: how tokens are chosen.
      vocab_size: tokens of the tokenizer; the model may have more, whose scores are left out.
    """

    model: ModelConfig
    attention: AttentionConfig
    capacity: int
    sampling: Sampling
    vocab_size: int

    @functools.cached_property
    def runs(self) -> dict[str, Run]:
        """The runs of layers by name, each with the window in which attention lets its tokens see.

        That is the model's, or the length of the longest document where that is less and was given to attention.
        """

        def seen(run: Run) -> Run:
            window = reach_of(self.attention, run.kind) or 0
            return dataclasses.replace(run, kind=dataclasses.replace(run.kind, window=window))

        return {run.name: seen(run) for run in self.model.loop.runs}


def make_plan(
    model: ModelConfig,
    mesh: Mesh,
    *,
    capacity: int,
    attention: AttentionConfig | None = None,
    sampling: Sampling | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> Plan:
    """Return what the programs are compiled for; raises ValueError for what does not fit."""
    fits = chunk is None or is_whole(chunk, 1) and chunk <= MOST_TOKENS
    require(fits, f"chunk={shown(chunk)} must be a whole number of tokens, 1 or more; leave it out to read all at once")
    attention = dataclasses.replace(attention or AttentionConfig(), layout="striped", speeds="", impl="auto")
    plan = Plan(
        model=attention.completed(model),
        attention=attention,
        capacity=capacity,
        sampling=sampling or Sampling(),
        vocab_size=model.vocab_size if vocab_size is None else vocab_size,
    )
    _check(plan, mesh)
    return plan


def _check(plan: Plan, mesh: Mesh) -> None:
    """Raise ValueError unless the model, its attention and the mesh can generate together."""
    model, shape = plan.model, mesh.shape
    has = f"mesh has the axes {dict(shape)}"
    require(tuple(shape) == AXES, f"{has}, need {', '.join(AXES)}; make it with make_mesh")
    require(
        shape[FSDP] == 1,
        f"{has}; generation needs fsdp=1: shard rows over dp, the cache and the parameters over sp, heads over tp",
    )
    capacity = f"capacity={shown(plan.capacity)}"
    fits = is_whole(plan.capacity, 1) and plan.capacity <= MOST_TOKENS
    require(fits, f"{capacity} must be a whole number of tokens, 1 to {MOST_TOKENS}; give prompt and continuation room")
    fits = is_whole(plan.vocab_size, 1) and plan.vocab_size <= model.vocab_size
    require(fits, f"vocab_size={shown(plan.vocab_size)} must be 1 to model.vocab_size={model.vocab_size}; leave it out")
    check_fits("model.num_heads", model.num_heads, "heads", shape)
    check_fits("model.num_kv_heads", model.num_kv_heads, "kv_heads", shape)
    check_fits("model.ffn_dim", model.ffn_dim, "ffn", shape)
    check_fits("model.vocab_size", model.vocab_size, "vocab", shape)
    exact = [name for name, known in STRATEGIES.items() if known.exact]
    for strategy in strategies_of(plan.attention, model):
        require(
            strategy.exact,
            f"strategy={strategy.name!r} is not exact, so that a cache would hold other keys; use {', '.join(exact)}",
        )
    layout = SequenceLayout("striped", shape[SEQUENCE])
    slots = layout.padded_length(plan.capacity) // layout.ring_size
    check_kinds(plan.attention, model, layout, slots, shape[TENSOR])
