"""A plan for a config on a pod: what it needs, how long a step takes by each strategy, and which one to take."""

import dataclasses

from flax.traverse_util import flatten_dict

from ring_attention.checks import require_field
from ring_attention.hardware.chips import Chip
from ring_attention.hardware.topology import Topology
from ring_attention.parallel.mesh import TENSOR
from ring_attention.parallel.ring import SingleDevice
from ring_attention.parallel.strategies import STRATEGIES, scheduled
from ring_attention.parallel.strategy import Strategy
from ring_attention.planning.hiding import Hiding, hiding_of
from ring_attention.planning.memory import Memory, memory_of
from ring_attention.planning.shares import Share
from ring_attention.planning.step_times import StepTime, step_time
from ring_attention.training.attend import check_kind
from ring_attention.training.attention_config import STRATEGY_OPTIONS
from ring_attention.training.config import TrainConfig
from ring_attention.training.config_values import config_to_dict, spelt

EQUAL = 0.02
"""Steps whose predicted times differ by no more than this part count as equally fast."""

GRAIN = 256
"""Tokens of a device of which a context that is proposed is a multiple: what every layout and kernel can share out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run the planned step, and what it costs.

    Attributes:
      share: one device's part of it, whose config says which way.
      time: predicted seconds of a step.
      memory: predicted bytes of a device.
    """

    share: Share
    time: StepTime
    memory: Memory

    @property
    def strategy(self) -> Strategy:
        """The strategy of attention, with its options."""
        return self.share.strategy

    @property
    def label(self) -> str:
        """The strategy's name and options."""
        options = [
            f"{field.name}={getattr(self.strategy, field.name)}"
            for field in dataclasses.fields(self.strategy)
            if field.init and getattr(self.strategy, field.name) != field.default
        ]
        return " ".join([self.strategy.name, *options])

    @property
    def fits(self) -> bool:
        """Whether the memory is there, of the device and of its host."""
        return fits_in(self.memory, self.share.topology.chip)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the step's operations over what the pod could do in that time at its peak."""
        share = self.share
        return step_flops(share) / self.time.total / share.devices / share.topology.chip.flops

    def flags(self, config: TrainConfig) -> tuple[str, ...]:
        """How to choose it on the command line of train.py that gives `config`."""
        return changed_flags(config, self.share.config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to expect of a config on a pod.

    Attributes:
      share: one device's part of a step.
      memory: predicted bytes of a device, by the config's own strategy.
      own: the config's own strategy.
      candidates: all strategies that can do the same, the fastest first.
      recommended: the one to take; None if none fits.
      reason: why, in words.
      hiding: tokens that a device must hold.
      longest: the longest context that fits by the prediction, tokens; 0 if none does.
    """

    share: Share
    memory: Memory
    own: Candidate
    candidates: tuple[Candidate, ...]
    recommended: Candidate | None
    reason: str
    hiding: tuple[Hiding, ...]
    longest: int

    @property
    def model_flops(self) -> float:
        """The operations of a step of the whole pod, without repetitions."""
        return step_flops(self.share)


def step_flops(share: Share) -> float:
    """Count the model FLOPs of a step; see `ModelConfig.training_flops`."""
    config = share.config
    pairs = config.transformer.visible_pairs([config.seq_len] * config.batch_size)
    return config.transformer.training_flops(config.batch_size * config.seq_len, pairs)


def make_plan(config: TrainConfig, topology: Topology) -> Plan:
    """Plan without compiling anything; raises ConfigError if the pod cannot run the config, whatever its memory, or if
    the planner does not know how long its attention takes.
    """
    require_field(
        not config.attention.speeds,
        "attention.speeds",
        config.attention.speeds,
        "a plan takes all devices for alike",
        "leave it out for planning, and see python -m scripts.figures simulate_ring for unequal devices",
    )
    share = Share.of(config, topology)
    candidates = candidates_of(share)
    own = candidate_of(share)
    if own.label not in [candidate.label for candidate in candidates]:
        candidates = sorted([*candidates, own], key=lambda candidate: candidate.time.total)
    recommended, reason = recommend(candidates)
    return Plan(
        share=share,
        memory=own.memory,
        own=own,
        candidates=tuple(candidates),
        recommended=recommended,
        reason=reason,
        hiding=hiding_of(share),
        longest=longest_context(config, topology),
    )


def recommend(candidates: list[Candidate]) -> tuple[Candidate | None, str]:
    """Choose the fastest of those that fit, among equally fast ones that with the least memory, and say why."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        least = min(candidates, key=lambda candidate: candidate.memory.total)
        return None, f"no strategy fits: the least, {least.label}, needs {least.memory.total / 2**30:.1f} GiB"
    fastest = min(candidate.time.total for candidate in fitting)
    equal = [candidate for candidate in fitting if candidate.time.total <= fastest * (1 + EQUAL)]
    best = min(equal, key=lambda candidate: (candidate.memory.total, candidate.label))
    return best, _reason(best, candidates, equal)


def _reason(best: Candidate, candidates: list[Candidate], equal: list[Candidate]) -> str:
    words = []
    waits = best.time.attention_waits
    if waits < 0.01 * best.time.total:
        words.append(f"its transfers cost {waits / best.time.total:.1%} of the step")
    else:
        words.append(f"it waits {waits / best.time.total:.0%} of the step for its transfers, the others more or longer")
    others = [candidate.label for candidate in equal if candidate is not best]
    if others:
        words.append(
            f"{', '.join(others)} {'is as fast and needs' if len(others) == 1 else 'are as fast and need'} more memory"
        )
    slower = [c for c in candidates if c.fits and c not in equal]
    if slower:
        factor = slower[0].time.total / best.time.total
        words.append(f"the next, {slower[0].label}, takes {factor:.2f} times as long")
    too_large = [candidate.label for candidate in candidates if not candidate.fits]
    if too_large:
        words.append(f"{', '.join(too_large)} would not fit")
    return "; ".join(words)


def candidates_of(share: Share, strategies: list[Strategy] | None = None) -> list[Candidate]:
    """Price these strategies, or all that can do this attention; the fastest comes first."""
    strategies = strategies_of(share) if strategies is None else strategies
    return sorted((candidate_of(by_strategy(share, s)) for s in strategies), key=lambda c: c.time.total)


def strategies_of(share: Share) -> list[Strategy]:
    """List every exact strategy that this mesh, shape and kernel can run; see `attend.check_kind`.

    Where "auto" would take a fused kernel for some of them, those for which it would not are left out.
    """
    if share.main_kind.is_local:
        return [share.strategy]  # no layer is of `attention.strategy`
    work = share.work()
    both_ways = share.topology.chip.links > 1  # one link, into a switch, carries no more if it sends both ways
    known = [STRATEGIES[name] for name in scheduled(work)] if share.ring > 1 else [SingleDevice()]
    strategies = [x for known in known if known.exact and known.full for x in known.variants(work, both_ways)]
    running = [strategy for strategy in strategies if _can_run(by_strategy(share, strategy))]
    fused = [strategy for strategy in running if by_strategy(share, strategy).attention.kernel.platform]
    return fused or running


def _can_run(share: Share) -> bool:
    attention, layout = share.config.attention, share.config.attention.make_layout(share.ring)
    parts = share.mesh[TENSOR] * share.model.head_groups
    for group in share.groups:
        kernel = share.attention_of(group.kind).kernel
        if attention.impl == "auto" and kernel.platform:
            continue  # "auto" takes a fused kernel only where kernel and strategy can do what is asked
        options = dict(strategy=share.strategy_of(group.kind), kernel=kernel)
        try:
            check_kind(attention, share.model, group.kind, layout, share.tokens, parts, **options)
        except ValueError:
            return False
    return True


def by_strategy(share: Share, strategy: Strategy) -> Share:
    """Return the same step by another strategy."""
    return dataclasses.replace(share, config=with_strategy(share.config, strategy))


def with_strategy(config: TrainConfig, strategy: Strategy) -> TrainConfig:
    """Return the config with another strategy; options that it does not have are left out."""
    own = config.attention
    options = {name: getattr(strategy, name, None) or type(getattr(own, name))() for name in STRATEGY_OPTIONS}
    return dataclasses.replace(config, attention=dataclasses.replace(own, strategy=strategy.name, **options))


def candidate_of(share: Share) -> Candidate:
    """Price a step as its config says."""
    return Candidate(share=share, time=step_time(share, share.strategy), memory=memory_of(share, share.strategy))


def fits_in(memory: Memory, chip: Chip, part: float = 1.0) -> bool:
    """Whether that part of a device's memory, and of its host's, is enough."""
    return memory.total <= part * chip.memory and memory.host <= part * chip.host_memory


def changed_flags(before: TrainConfig, after: TrainConfig) -> tuple[str, ...]:
    """Return the flags that turn one config into another, which has the same fields but for their values."""
    old, new = (flatten_dict(config_to_dict(config), sep=".") for config in (before, after))
    return tuple(f"--config.{field}={spelt(value)}" for field, value in new.items() if value != old[field])


def longest_context(config: TrainConfig, topology: Topology) -> int:
    """Find the longest context, in tokens, whose predicted memory is there, to within 1/64; 0 if there is none."""
    share = Share.of(config, topology)
    step = GRAIN * share.ring

    def fits(tokens: int) -> bool:
        longer = dataclasses.replace(share, config=dataclasses.replace(config, seq_len=tokens))
        return fits_in(memory_of(longer, longer.strategy), topology.chip)

    low, high = 0, step
    while fits(high) and high < 2**40:
        low, high = high, 2 * high
    while high - low > max(step, low // 64):
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
