"""The parts of a checkup, each of which measures one thing and gives what JSON can hold."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax

from ring_attention.attention.kernels import KERNELS
from ring_attention.checks import ConfigError, one_line
from ring_attention.doctor.exactness import error_ratios, refusal
from ring_attention.doctor.limits import find_limits
from ring_attention.doctor.links import measure_links, measure_overlap
from ring_attention.doctor.rates import Case, matmul_rate, measure
from ring_attention.doctor.step import measure_step, share_of, small_config
from ring_attention.hardware.chips import Chip, chip_of
from ring_attention.parallel.mesh import make_mesh
from ring_attention.planning.memory import memory_of
from ring_attention.training.config import TrainConfig

PUBLISHED = dict(heads=64, kv_heads=8, head_dim=128, shard=8192)
"""The shape of which MagiAttention and its comparisons publish TFLOP/s on an H100."""

MOST_OF_MEMORY = 0.7
"""Share of a device's memory that the small model may be predicted to need."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkup:
    """What to measure on which devices.

    Attributes:
      devices: of one kind.
      config: whose shapes are measured.
      tokens: of a device; at most, for the slow tiles of XLA on an accelerator.
      layers: of the model that is trained, at most.
      repeats: of everything that is timed, at most.
    """

    devices: Sequence[jax.Device]
    config: TrainConfig
    tokens: int
    layers: int
    repeats: int

    @property
    def simulated(self) -> bool:
        """Whether the devices are simulated and share the cores of a machine."""
        return self.devices[0].platform == "cpu"

    @property
    def chip(self) -> Chip | None:
        """The chip that the devices are, if it is known."""
        return chip_of(self.devices[0].device_kind)

    @property
    def dtype(self) -> str:
        """Of queries and keys: fused kernels take bfloat16."""
        return self.config.model.compute_dtype if self.simulated else "bfloat16"

    @property
    def ring(self) -> int:
        """Devices of the ring one of whose ranks is measured: the config's, at most 8; 8 if that is not known."""
        return min(size, 8) if (size := self.config.mesh.sp) > 1 else 8

    def case(self, **changes) -> Case:
        """The shapes of the config, of a device in the middle of its ring."""
        model, tp = self.config.model, max(self.config.mesh.tp, 1)
        fields = dict(heads=max(model.num_heads // tp, 1), kv_heads=max(model.num_kv_heads // tp, 1))
        fields |= dict(head_dim=model.head_dim, shard=self.tokens, devices=self.ring, place=self.ring // 2 - 1)
        return Case(**(fields | {"dtype": self.dtype} | changes))


def limits(checkup: Checkup, found: Mapping) -> dict:
    """Versions, driver, memory."""
    return find_limits(checkup.devices)


def step(checkup: Checkup, found: Mapping) -> dict:
    """A training step with as many layers as are asked for and fit."""
    chip, devices = checkup.chip, len(checkup.devices)
    for layers in range(checkup.layers, 0, -1):
        config = small_config(checkup.config, devices, checkup.tokens, layers)
        if chip is None or layers == 1:
            break
        share = share_of(config, chip)
        if memory_of(share, share.strategy).total <= MOST_OF_MEMORY * chip.memory:
            break
    return measure_step(config, checkup.devices, checkup.repeats)


def kernels(checkup: Checkup, found: Mapping) -> dict:
    """Kernel -> its errors over dense attention's, or why it cannot run here, or how it failed."""
    sizes = dict(head_dim=checkup.config.model.head_dim, dtype=checkup.dtype, shard=128 if checkup.simulated else 512)
    results = {}
    for name in KERNELS:
        if reason := refusal(name, checkup.devices[0].platform, **sizes):
            results[name] = {"refused": reason}
            continue
        try:
            ratios = error_ratios(name, **sizes)
            wrong = [part for part, ratio in ratios.items() if not math.isfinite(ratio)]
            results[name] = (
                {"failed": f"{wrong[0]} is not finite"} if wrong else {"dtype": checkup.dtype, "ratios": ratios}
            )
        except Exception as error:  # a kernel that raises is a finding, and the next one may run
            results[name] = {"failed": failure(error)}
    return results


def rates(checkup: Checkup, found: Mapping) -> dict:
    """FLOP/s of dense layers, TFLOP/s of each kernel that runs at the config's shapes, and at those published."""
    model, platform, rows = checkup.config.model, checkup.devices[0].platform, []
    fused = [name for name, kernel in KERNELS.items() if kernel.platform == platform]
    shapes = {"config": {}} if checkup.simulated else {"config": {}, "published": PUBLISHED}
    for name in [*fused, "xla"]:
        for shape, changes in shapes.items():
            tiles = name == "xla" and not checkup.simulated
            if tiles and shape != "config":
                continue
            case = checkup.case(**(changes | ({"shard": min(checkup.tokens, 2048)} if tiles else {})))
            sizes = dict(shard=case.shard, head_dim=case.head_dim, dtype=case.dtype)
            if refusal(name, platform, **sizes):
                continue  # the part kernels says so
            try:
                result = {"passes": measure(case, name, checkup.repeats, seconds=5.0, compare=shape == "config")}
            except Exception as error:  # as for kernels
                result = {"failed": failure(error)}
            rows.append({"kernel": name, "shape": shape} | dataclasses.asdict(case) | result)
    matmul = matmul_rate(checkup.tokens, model.model_dim, model.ffn_dim, checkup.dtype, checkup.repeats)
    return {"matmul": matmul, "rows": rows}


def links(checkup: Checkup, found: Mapping) -> dict:
    """Bandwidth and latency along the ring of all devices and against it."""
    sizes = [2**n for n in ((13, 16, 20, 22) if checkup.simulated else (16, 20, 24, 26, 28))]
    return measure_links(_ring_of(checkup), sizes, checkup.repeats)


def overlap(checkup: Checkup, found: Mapping) -> dict:
    """The share of the transfers that the hops of a ring of all devices hide."""
    best = best_row(found.get("rates"))
    impl = best["kernel"] if best else checkup.config.attention.impl
    return {"kernel": impl} | measure_overlap(_ring_of(checkup), checkup.case(), impl, checkup.repeats)


PARTS: dict[str, Callable[[Checkup, Mapping], dict]] = {
    part.__name__: part for part in (limits, step, kernels, rates, links, overlap)
}
"""Name -> what measures it, given what was found before. The step comes first: its peak of memory is the process's."""


def best_row(rates: Mapping | None) -> dict | None:
    """Of what the part rates found, the kernel whose hops are the fastest forward at the config's shapes; or None."""
    rows = [row for row in (rates or {}).get("rows", ()) if "passes" in row and row["shape"] == "config"]
    return max(rows, key=lambda row: row["passes"]["forward"]["hops"], default=None)


def measured_rates(found: Mapping) -> dict[str, float | str | None]:
    """What `plan.py --measured` takes, None where it was not measured.

    Operations a second of dense layers and of one call of the kernel whose hops are the best (the planner adds what
    merging hops takes), bytes a second of the slower way round the ring.
    """
    best, ways = best_row(found.get("rates")), found.get("links")
    tera = {name: best and best["passes"][name]["one call"] * 1e12 for name in ("forward", "backward")}
    return {
        "kernel": best and best["kernel"],
        "matmul": found["rates"]["matmul"] if "rates" in found else None,
        "attention": tera["forward"],
        "attention_backward": tera["backward"],
        "link": min(way["bandwidth"] for way in ways.values()) if ways else None,
    }


def failure(error: Exception) -> str:
    """An error in one line, as people and JSON read it."""
    words = one_line(error)[:300]
    return words if isinstance(error, ConfigError) else f"{type(error).__name__}: {words}"


def _ring_of(checkup: Checkup):
    if len(checkup.devices) == 1:
        raise NothingToMeasureError("there is one device, and nobody to send to")
    return make_mesh(devices=checkup.devices)


class NothingToMeasureError(Exception):
    """A part does not apply to these devices, which is no fault of theirs."""
