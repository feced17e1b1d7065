"""The ways to run a step that a search considers: mesh, strategy, rematerialisation, groups of heads, micro-batches.

Memory is asked first, since it costs microseconds, and time only of what fits and of what nothing beats for certain.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from ring_attention.checks import ConfigError
from ring_attention.hardware.topology import Topology
from ring_attention.models.config import REMAT_POLICIES
from ring_attention.parallel.ring import Ring
from ring_attention.planning.memory import memory_of
from ring_attention.planning.plan import GRAIN, by_strategy, fits_in, strategies_of, with_strategy
from ring_attention.planning.shares import Share
from ring_attention.training.config import OFFLOADS, MeshConfig, TrainConfig

FREE = 0.1
"""Part of a device's memory that advice leaves free: of twelve advised steps that were compiled eleven took up to 1.12
times what was predicted; one, of Ulysses with tensor parallelism on v5e, 1.24 times (docs/planner.md)."""

FRUGAL = ("full", "offload_input")
"""Policies of rematerialisation that keep least, on the device and on its host."""

_BEATEN = {"none": set(REMAT_POLICIES) - {"none"}, "attention": {"full", "offload", "offload_input"}}
"""Policy -> those that compute or move all that it does, and more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a search may change of a config, beside the mesh and the strategy. The fields are the config's.

    Attributes:
      remat: what layers keep for the backward pass.
      head_groups: parts of a device's heads that are computed one after the other.
      accumulation_steps: micro-batches of a step.
      offload: what of the optimizer's state and of the parameters the host keeps.
    """

    remat: str
    head_groups: int
    accumulation_steps: int
    offload: str

    @staticmethod
    def in_(config: TrainConfig) -> "Setting":
        """Read the setting of a config."""
        return Setting(
            remat=config.model.remat,
            head_groups=config.model.head_groups,
            accumulation_steps=config.optimizer.accumulation_steps,
            offload=config.optimizer.offload,
        )

    def of(self, config: TrainConfig) -> TrainConfig:
        """Return the config with this setting; eval_sequences become a multiple of the sequences that run at once."""
        micro = config.batch_size // self.accumulation_steps
        model = dataclasses.replace(config.model, remat=self.remat, head_groups=self.head_groups)
        changes = dict(accumulation_steps=self.accumulation_steps, offload=self.offload)
        optimizer = dataclasses.replace(config.optimizer, **changes)
        sequences = -(-config.eval_sequences // micro) * micro
        return dataclasses.replace(config, model=model, optimizer=optimizer, eval_sequences=sequences)

    def beats(self, other: "Setting") -> bool:
        """Whether a step with this setting is no slower for certain, on the same mesh by the same strategy."""
        fewer = self.head_groups <= other.head_groups and self.accumulation_steps <= other.accumulation_steps
        less = OFFLOADS.index(self.offload) <= OFFLOADS.index(other.offload)
        return fewer and less and other.remat in _BEATEN.get(self.remat, ())


MOST_TOKENS = 2**31 - 1
"""Of a sequence: positions are int32."""


def divisors(number: int) -> list[int]:
    """List the divisors of a positive number, the smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def head_groups(config: TrainConfig, tp: int) -> list[int]:
    """List into how many parts the heads of one of `tp` devices can be computed; see `ModelConfig.head_groups`."""
    return [1] if config.model.qk_norm_across else divisors(config.model.num_kv_heads // tp)


def meshes(config: TrainConfig, topology: Topology) -> list[MeshConfig]:
    """List the meshes worth trying: tp inside a host or a slice; dp not at all, over these, or as the config has it.

    sp is -1 where the config has it so: what is left.
    """
    devices, found = topology.devices, []
    copies = {1, max(config.mesh.dp, 1), devices // topology.domain}
    for tp, dp in itertools.product(divisors(math.gcd(devices, config.model.num_kv_heads)), sorted(copies)):
        for fsdp in divisors(config.batch_size):
            rest, left_over = divmod(devices, tp * dp * fsdp)
            if tp <= topology.domain and not left_over and config.batch_size % (dp * fsdp) == 0:
                found.append(MeshConfig(dp=dp, fsdp=fsdp, sp=min(config.mesh.sp, 0) or rest, tp=tp))
    return found


def steps_of(config: TrainConfig, topology: Topology) -> Iterator[Share]:
    """Yield the step on every mesh that can run it, by every strategy, with micro-batches as small as can be.

    The heads of a device are in one group, then in ever more; kernel and strategy are asked for each number.
    """
    for mesh in meshes(config, topology):
        most = config.batch_size // (mesh.dp * mesh.fsdp)
        for groups in head_groups(config, mesh.tp):
            setting = Setting(remat="full", head_groups=groups, accumulation_steps=most, offload=OFFLOADS[0])
            try:  # by a strategy that every mesh can run
                share = Share.of(with_strategy(dataclasses.replace(setting.of(config), mesh=mesh), Ring()), topology)
            except ConfigError:
                continue
            yield from (by_strategy(share, strategy) for strategy in strategies_of(share))


def runs(share: Share) -> bool:
    """Whether the pod can run this, whatever its memory."""
    try:
        Share.of(share.config, share.topology)
    except ConfigError:
        return False
    return True


def fits(share: Share) -> bool:
    """Whether a step's memory is there, with some to spare (`FREE`)."""
    return fits_in(memory_of(share, share.strategy), share.topology.chip, 1 - FREE)


def with_setting(share: Share, setting: Setting) -> Share:
    """Return the step with this setting, on the same mesh by the same strategy."""
    return dataclasses.replace(share, config=setting.of(share.config))


def fitting(config: TrainConfig, topology: Topology) -> list[Share]:
    """List the steps that fit, but for those that others of the list beat for certain.

    Of each mesh, strategy, rematerialisation and offloading those with the fewest groups of heads, and then the fewest
    micro-batches; nothing more is offloaded than is needed for that.
    """
    found: dict[tuple, dict[tuple, Setting]] = {}
    first: dict[tuple, Share] = {}
    for share in steps_of(config, topology):
        key = (share.config.mesh, share.strategy)
        first.setdefault(key, share)
        most, known = share.config.optimizer.accumulation_steps, found.setdefault(key, {})
        for remat, offload in itertools.product(REMAT_POLICIES, OFFLOADS):
            if any((remat, less) in known for less in OFFLOADS[: OFFLOADS.index(offload) + 1]):
                continue
            setting = dataclasses.replace(Setting.in_(share.config), remat=remat, offload=offload)
            if not fits(with_setting(share, setting)):
                continue  # with larger micro-batches even less
            tries = (dataclasses.replace(setting, accumulation_steps=steps) for steps in divisors(most))
            known[remat, offload] = next(x for x in tries if fits(with_setting(share, x)))
    return [
        with_setting(first[key], setting)
        for key, known in found.items()
        for setting in known.values()
        if not any(other.beats(setting) for other in known.values())
    ]


def longest(config: TrainConfig, topology: Topology) -> int:
    """Find the longest context that any of them fits, in tokens, to within 1/64; 0 if there is none."""
    step, best = GRAIN * topology.devices, 0
    for share in steps_of(config, topology):
        for remat, offload in itertools.product(FRUGAL, OFFLOADS):
            setting = dataclasses.replace(Setting.in_(share.config), remat=remat, offload=offload)
            best = max(best, _longest_of(with_setting(share, setting), best, step))
    return best


def _longest_of(share: Share, beyond: int, step: int) -> int:
    """Find the longest context of one way to run a step, in multiples of `step`; 0 if it is no longer than `beyond`."""

    def fit(tokens: int) -> bool:
        return tokens <= MOST_TOKENS and fits(with_tokens(share, tokens))

    low, high = beyond, max(beyond + beyond // 64, beyond + step) // step * step
    if not fit(high):
        return 0
    while fit(high):
        low, high = high, 2 * high
    while high - low > max(step, low // 64):
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def with_tokens(share: Share, tokens: int) -> Share:
    """Return the step with sequences of so many tokens."""
    return dataclasses.replace(share, config=dataclasses.replace(share.config, seq_len=tokens))
