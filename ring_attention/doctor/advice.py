"""What is off in what was measured, each in a line with what to do about it. Nothing is measured here."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ring_attention.doctor.checkup import best_row
from ring_attention.doctor.limits import FRACTION
from ring_attention.hardware.chips import GPU_MEMORY_FRACTION, Chip, GiB, chip_of
from ring_attention.hardware.reach import kernel_rate

LARGEST_RATIO = 2.0
"""Of an error to dense attention's in the same dtype, as in the tests."""

SLOW = 0.7
"""Share of the rate that the planner takes for a kernel, below which it is slow."""

SLOW_LINK = 0.8
"""Share of a link's published bandwidth below which it is slow."""

LARGEST_MEMORY_ERROR = 0.15
"""Relative, of the planner's prediction, as `python -m scripts.verify prediction` has it."""

LEAST_HIDDEN = 0.8
"""Share of a ring's transfers that its hops should hide."""


class Advice(NamedTuple):
    """A line of advice. `wrong` says that something is off on these devices; otherwise it is good to know."""

    part: str
    wrong: bool
    words: str


def advise(found: Mapping, failed: Mapping[str, str], *, platform: str, device_kind: str) -> list[Advice]:
    """Judge what the parts found; a chip that is not in the table has no rate to be held to."""
    advice = [Advice(name, True, f"{words}; the other parts do not depend on it") for name, words in failed.items()]
    chip = chip_of(device_kind)
    if platform == "cpu":
        advice.append(
            Advice("devices", False, "simulated devices share the cores of this machine: no rate here is a chip's")
        )
    elif chip is None:
        words = f"{device_kind!r} is not in the table of chips: its rates are shown and not judged"
        advice.append(Advice("devices", False, words))
    advice += of_kernels(found.get("kernels", {}), platform)
    if chip is not None:
        advice += of_limits(found.get("limits", {}), chip)
        advice += of_rates(found.get("rates", {}), chip)
        advice += of_links(found.get("links", {}), chip)
        advice += of_overlap(found.get("overlap"))
        advice += of_step(found.get("step"))
    return advice


def of_kernels(kernels: Mapping, platform: str) -> Iterator[Advice]:
    """A kernel that is wrong or raises."""
    for name, result in kernels.items():
        if words := result.get("failed"):
            yield Advice("kernels", True, f"impl={name} does not run: {words}; use another")
        worst, ratio = max(result.get("ratios", {}).items(), key=lambda x: x[1], default=("", 0.0))
        if ratio > LARGEST_RATIO:
            words = f"impl={name} is wrong here: {worst} is {ratio:.3g} times as far from the oracle as dense attention"
            yield Advice("kernels", True, f"{words} ({LARGEST_RATIO:g} is allowed); use another, and report it")


def of_limits(limits: Mapping, chip: Chip) -> Iterator[Advice]:
    """Memory that JAX leaves unused on a GPU."""
    least = min((device["memory"] or chip.memory for device in limits.get("devices", ())), default=chip.memory)
    if chip.platform == "gpu" and least < 0.95 * chip.memory:
        words = f"JAX takes {least / GiB:.1f} GiB of a GPU, of {chip.memory / GiB:.1f} GiB that are planned with"
        yield Advice("limits", True, f"{words}; set {FRACTION}={GPU_MEMORY_FRACTION:g}")


def of_rates(rates: Mapping, chip: Chip) -> Iterator[Advice]:
    """Kernels that fail where they are timed, and a best kernel that is slow."""
    for row in rates.get("rows", ()):
        if words := row.get("failed"):
            yield Advice("rates", True, f"impl={row['kernel']} failed at {row['shape']}'s shapes: {words}; report it")
    best = best_row(rates)
    planned = best and kernel_rate(chip, {"gpu": "cudnn", "tpu": "splash"}[chip.platform], best["head_dim"])
    wanted = {"forward": planned.forward, "backward": planned.backward} if planned else {}
    for name, share in wanted.items():
        got, want = best["passes"][name]["hops"], share * chip.flops / 1e12
        if got < SLOW * want:
            words = f"the hops of impl={best['kernel']}, the fastest, do {got:.4g} TFLOP/s {name}"
            remedy = "see why in the part kernels" if best["kernel"] == "xla" else "look for other work on the chip"
            yield Advice("rates", True, f"{words}, where {want:.0f} of {chip.name}'s peak are planned with; {remedy}")


def of_links(links: Mapping, chip: Chip) -> Iterator[Advice]:
    """A way round the ring that is slow."""
    for way, found in links.items():
        if found["bandwidth"] < SLOW_LINK * chip.link:
            words = f"a hop {way} the ring carries {found['bandwidth'] / 1e9:.3g} GB/s, {chip.name}'s link is published"
            see = "nvidia-smi topo -m" if chip.platform == "gpu" else "parallel.wires.hops_of(mesh)"
            words += f" at {chip.link / 1e9:.0f}; see what lies between neighbours ({see}), or plan with --measured"
            yield Advice("links", True, words)


def of_overlap(overlap: Mapping | None) -> Iterator[Advice]:
    """Transfers that wait."""
    if overlap and overlap["hidden"] < LEAST_HIDDEN:
        words = f"hops hide {overlap['hidden']:.0%} of their transfers; more tokens a device hide more"
        yield Advice(
            "overlap", True, f"{words} (plan.py says how many), and ra.compiler_options(mesh) lets them overlap"
        )


def of_step(step: Mapping | None) -> Iterator[Advice]:
    """A prediction of memory that does not hold."""
    if step is None:
        return
    used, predicted = step["peak_bytes"] or step["compiled_bytes"], step["predicted_bytes"]
    if abs(predicted / used - 1) > LARGEST_MEMORY_ERROR:
        words = f"a step takes {used / GiB:.2f} GiB where {predicted / GiB:.2f} are predicted"
        yield Advice("step", True, f"{words}; plan with {used / predicted:.2f} times the memory, and report it")
