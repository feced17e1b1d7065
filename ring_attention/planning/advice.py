"""What to run: the fastest step that fits a pod, the longest context, and what would make fit what does not."""

import dataclasses
from collections.abc import Iterable, Iterator

from ring_attention.hardware.chips import GiB
from ring_attention.hardware.topology import Topology, find_topology
from ring_attention.models.config import REMAT_POLICIES
from ring_attention.parallel.mesh import TENSOR
from ring_attention.planning import search
from ring_attention.planning.plan import EQUAL, Candidate, by_strategy, candidate_of, strategies_of
from ring_attention.planning.shares import Share, resolve_config_mesh
from ring_attention.training.config import TrainConfig

MOST_SIDE = 16
"""Chips along a side of the largest slice of a TPU pod that is proposed."""

MOST_SLICES = 64
"""Slices of the largest group of them that is proposed."""

MOST_HOSTS = 4096
"""Hosts of the largest cluster of GPUs that is proposed."""

ADVISED = ("fastest", "longest", "one_change", "larger")
"""Fields of `Advice` that are ways to run a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """What a search found for a config on a pod.

    Attributes:
      fastest: of what fits, with the config's own batch; see `best_of`. None if nothing fits.
      longest: the fastest at the longest context that fits, with as many sequences; None if none does.
      one_change: where the config as it is does not fit, the fastest that differs in one thing and fits; else None.
      larger: where nothing fits, the smallest larger pod on which something does, and the fastest there; else None.
      compared: how many ways to run the step had their time predicted.
    """

    fastest: Candidate | None
    longest: Candidate | None
    one_change: Candidate | None
    larger: Candidate | None
    compared: int


def advise(config: TrainConfig, topology: Topology) -> Advice:
    """Search all ways to run the config's step on the pod; see `search` for which. Nothing is compiled.

    Raises:
      ConfigError: if the pod cannot run the config as it is, whatever its memory.
    """
    own = Share.of(config, topology)
    found = search.fitting(config, topology)
    fastest = best_of(found, config)
    tokens = search.longest(config, topology)
    longer = dataclasses.replace(config, seq_len=tokens or config.seq_len)
    return Advice(
        fastest=fastest,
        longest=best_of(search.fitting(longer, topology), config) if tokens else None,
        one_change=None if search.fits(own) else one_change(own),
        larger=None if found else larger_pod(config, topology),
        compared=len(found),
    )


def best_of(shares: Iterable[Share], config: TrainConfig) -> Candidate | None:
    """Choose the fastest that the pod can run, and among those as fast within `EQUAL` the one that asks for least.

    That is one that needs nothing of the host, then the least of a device's memory in hundredths, and then the fewest
    changes of the config.
    """
    ordered = sorted(map(candidate_of, shares), key=lambda candidate: candidate.time.total)
    fastest = next((candidate for candidate in ordered if search.runs(candidate.share)), None)
    if fastest is None:
        return None

    def asks(candidate: Candidate) -> tuple:
        memory, chip = candidate.memory, candidate.share.topology.chip
        return memory.host > 0, round(100 * memory.total / chip.memory), len(candidate.flags(config)), memory.total

    equal = [x for x in ordered if x.time.total <= fastest.time.total * (1 + EQUAL) and search.runs(x.share)]
    return min(equal, key=asks)


def one_change(own: Share) -> Candidate | None:
    """Find the fastest step that fits and differs from the config in one thing only; None if there is none."""
    return best_of(filter(search.fits, filter(search.runs, _changed_once(own))), own.config)


def _changed_once(own: Share) -> Iterator[Share]:
    """Yield the step with each other strategy, mesh, rematerialisation, number of groups or micro-batches, offload."""
    config, setting = own.config, search.Setting.in_(own.config)
    yield from (by_strategy(own, strategy) for strategy in strategies_of(own))
    changes = [{"remat": remat} for remat in REMAT_POLICIES] + [{"offload": offload} for offload in search.OFFLOADS]
    changes += [{"head_groups": groups} for groups in search.head_groups(config, own.mesh[TENSOR])]
    changes += [{"accumulation_steps": steps} for steps in search.divisors(config.batch_size)]
    for change in changes:
        yield search.with_setting(own, dataclasses.replace(setting, **change))
    for mesh in search.meshes(config, own.topology):
        other = dataclasses.replace(config, mesh=mesh)
        yield dataclasses.replace(own, config=other, mesh=resolve_config_mesh(other, own.topology))


def larger_pod(config: TrainConfig, topology: Topology) -> Candidate | None:
    """Find the smallest larger pod of the same chips on which something fits, and the fastest there; None if none.

    A TPU slice is doubled along its shortest side, and then there are more slices. Of GPUs, hosts are doubled until
    something fits, and then as many are taken away as can be.
    """
    hosts = topology.sides[0]
    for name in _slices(topology) if topology.tpu else _more_hosts(topology):
        found = _best_on(name, config, topology)
        if found is None:
            hosts = find_topology(name).sides[0]
            continue
        most = found.share.topology.sides[0]
        while not topology.tpu and most - hosts > 1:
            middle = (hosts + most) // 2
            fewer = _best_on(_with_hosts(topology, middle), config, topology)
            hosts, most, found = (hosts, middle, fewer) if fewer else (middle, most, found)
        return found
    return None


def _slices(topology: Topology) -> Iterator[str]:
    """Name larger slices of the same chips, and then more and more of the largest."""
    word, _, shape = topology.slice_name.partition(":")
    sides, slices = [int(side) for side in shape.split("x")], topology.slices
    while slices == 1 and min(sides) * 2 <= MOST_SIDE:
        sides[len(sides) - 1 - sides[::-1].index(min(sides))] *= 2
        yield f"{word}:{'x'.join(map(str, sides))}"
    while (slices := 2 * slices) <= MOST_SLICES:
        yield f"{slices}x{word}:{'x'.join(map(str, sides))}"


def _more_hosts(topology: Topology) -> Iterator[str]:
    hosts = topology.sides[0]
    while (hosts := 2 * hosts) <= MOST_HOSTS:
        yield _with_hosts(topology, hosts)


def _with_hosts(topology: Topology, hosts: int) -> str:
    return f"{topology.chip.name}:{hosts}x{topology.sides[1]}"


def _best_on(name: str, config: TrainConfig, like: Topology) -> Candidate | None:
    """The fastest that fits the pod of this name, with the chips of another; None where nothing fits."""
    pod = find_topology(name)
    pod = dataclasses.replace(like, name=name, sides=pod.sides, slices=pod.slices)
    return best_of(search.fitting(config, pod), config)


def in_words(candidate: Candidate) -> str:
    """Say in a line what a step takes: strategy, mesh, seconds, memory."""
    share = candidate.share
    mesh = " ".join(f"{name}={size}" for name, size in share.mesh.items() if size > 1) or "one device"
    setting = search.Setting.in_(share.config)
    words = [candidate.label, mesh, f"remat={setting.remat}"]
    words += [f"head_groups={setting.head_groups}"] * (setting.head_groups > 1)
    words += [f"accumulation_steps={setting.accumulation_steps}"] * (setting.accumulation_steps > 1)
    words += [f"{setting.offload} on the host"] * (setting.offload != search.OFFLOADS[0])
    memory = f"{candidate.memory.total / GiB:.1f} of {share.topology.chip.memory / GiB:.1f} GiB"
    memory += f", {candidate.memory.host / GiB:.0f} GiB of the host's" if candidate.memory.host else ""
    return f"{', '.join(words)}: {seconds(candidate.time.total)} a step, MFU {candidate.mfu:.0%}, {memory}"


def seconds(value: float) -> str:
    """Word the seconds of a step: with hundredths, where there are fewer than 100."""
    return f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"
