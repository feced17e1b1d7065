"""Published figures of GPUs, with their sources; where none is published the source begins with "assumed"."""

import types
from collections.abc import Mapping

from ring_attention.hardware.chip import GB, GPU_MEMORY_FRACTION, Chip, GiB

_FRACTION = f"{GPU_MEMORY_FRACTION:g} of what its driver leaves to programs, by XLA_PYTHON_CLIENT_MEM_FRACTION="
_FRACTION += f"{GPU_MEMORY_FRACTION:g}; JAX takes 0.75 unless that is set"


def _nvidia(
    name: str,
    sheet: str,
    machine: str,
    visible: float,
    sources: Mapping[str, str] = types.MappingProxyType({}),
    **fields,
) -> Chip:
    """An SXM GPU behind NVSwitch, of whose memory the driver leaves `visible` bytes to programs."""
    found = dict.fromkeys(("flops", "memory_bandwidth"), f"NVIDIA {sheet} datasheet, SXM, without sparsity")
    found |= {
        "memory": f"NVIDIA {sheet}: {_FRACTION}",
        "link": f"NVIDIA {sheet} datasheet: NVLink, half of what it states for both ways",
        "links": "one, into the NVSwitch",
        "network": f"NVIDIA {machine} user guide: one InfiniBand adapter for each GPU",
        "host_link": f"NVIDIA {sheet} datasheet: PCIe, half of what it states for both ways",
        "host_memory": f"NVIDIA {machine} user guide: the system's memory over its GPUs",
    }
    memory = GPU_MEMORY_FRACTION * visible
    return Chip(name=name, platform="gpu", links=1, memory=memory, sources=found | dict(sources), **fields)


_RACK = "NVIDIA GB200 NVL72 datasheet, of a rack, over its 72 GPUs"
_MI300X = "AMD Instinct MI300X data sheet"

GPUS = (
    _nvidia(
        "a100",
        "A100 80GB",
        "DGX A100",
        visible=79.1 * GiB,
        kinds=("NVIDIA A100-SXM4-80GB",),
        flops=312e12,
        memory_bandwidth=2039 * GB,
        link=300 * GB,
        network=25 * GB,
        host_memory=250 * GB,
        host_link=32 * GB,
    ),
    _nvidia(
        "a100-40",
        "A100 40GB",
        "DGX A100",
        visible=39.39 * GiB,
        kinds=("NVIDIA A100-SXM4-40GB",),
        flops=312e12,
        memory_bandwidth=1555 * GB,
        link=300 * GB,
        network=25 * GB,
        host_memory=125 * GB,
        host_link=32 * GB,
    ),
    _nvidia(
        "h100",
        "H100",
        "DGX H100",
        visible=79.1 * GiB,
        kinds=("NVIDIA H100 80GB HBM3",),
        flops=989.4e12,
        memory_bandwidth=3352 * GB,
        link=450 * GB,
        network=50 * GB,
        host_memory=250 * GB,
        host_link=64 * GB,
    ),
    _nvidia(
        "h200",
        "H200",
        "DGX H200",
        visible=139.7 * GiB,
        kinds=("NVIDIA H200", "NVIDIA H200 141GB HBM3e"),
        flops=989.4e12,
        memory_bandwidth=4800 * GB,
        link=450 * GB,
        network=50 * GB,
        host_memory=250 * GB,
        host_link=64 * GB,
    ),
    _nvidia(
        "b200",
        "HGX B200",
        "DGX B200",
        visible=178.36 * GiB,
        kinds=("NVIDIA B200",),
        flops=2250e12,
        memory_bandwidth=8000 * GB,
        link=900 * GB,
        network=50 * GB,
        host_memory=250 * GB,
        host_link=64 * GB,
    ),
    _nvidia(
        "gb200",  # a host of 4 GPUs is no border of links: that is the rack, of 72
        "GB200 NVL72",
        "DGX GB200",
        visible=184.31 * GiB,
        kinds=("NVIDIA GB200",),
        flops=2500e12,
        memory_bandwidth=8000 * GB,
        link=900 * GB,
        network=50 * GB,
        host_memory=236 * GB,
        host_link=225 * GB,
        sources={
            "flops": f"{_RACK}, without sparsity",
            "memory_bandwidth": _RACK,
            "links": "one, into the NVSwitches of the rack: 72 GPUs share one domain",
            "host_memory": f"{_RACK}: 17 TB of LPDDR5X",
            "host_link": "NVIDIA GB200 datasheet: NVLink-C2C of a Grace, half of the 900 GB/s for both ways; "
            "assumed to be shared evenly by its two GPUs",
        },
    ),
    _nvidia(
        "b300",
        "HGX B300",
        "DGX B300",
        visible=267.9 * GiB,
        kinds=("NVIDIA B300 SXM6 AC", "NVIDIA B300"),
        flops=2250e12,
        memory_bandwidth=8000 * GB,
        link=900 * GB,
        network=100 * GB,
        host_memory=250 * GB,
        host_link=64 * GB,
        sources={
            "memory": f"assumed: 275,040 MiB as nvidia-smi has it, less 0.7 GiB as on B200; {_FRACTION}",
            "host_link": "assumed: PCIe 5, which its host's processors have, half of both ways",
        },
    ),
    Chip(
        name="mi300x",
        platform="gpu",
        kinds=("AMD Instinct MI300X", "AMD Instinct MI300X VF"),
        flops=1307.4e12,
        memory=GPU_MEMORY_FRACTION * 191.5 * GiB,
        memory_bandwidth=5325 * GB,
        link=64 * GB,
        links=7,
        network=50 * GB,
        host_memory=250 * GB,
        host_link=64 * GB,
        sources=dict.fromkeys(("flops", "memory_bandwidth"), f"{_MI300X}, without sparsity")
        | {
            "memory": f"assumed: 192 GiB less half a GiB that the driver keeps; {_FRACTION}",
            "link": f"{_MI300X}: an Infinity Fabric link, half of the 128 GB/s for both ways",
            "links": f"{_MI300X}: of 8 GPUs on a platform, each wired to the 7 others",
            "network": "assumed: one adapter of 400 Gb/s for each GPU, which hosts of 8 have",
            "host_memory": "assumed: 2 TB for 8 GPUs",
            "host_link": f"{_MI300X}: PCIe 5 x16, half of the 128 GB/s for both ways",
        },
    ),
)
"""In the order in which they came; MI300X last, for which nothing compiles here."""
