"""Published figures of accelerators, of one JAX device each, and what programs reach of them, with their sources."""

import dataclasses
import types
from collections.abc import Mapping

GB, GiB = 1e9, 2**30

GPU_MEMORY_FRACTION = 0.92
"""Of a GPU's memory that JAX is told to take, by XLA_PYTHON_CLIENT_MEM_FRACTION in the job files: by itself it takes
0.75. The rest is left to CUDA, cuDNN and NCCL, which allocate beside it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device: a TPU chip (of v3 and tpu7x, a core: half a chip) or a GPU.

    Attributes:
      name: as a topology begins, such as "v5e".
      kinds: words of JAX's `device_kind` that tell it.
      flops: dense bfloat16 operations a second, the published peak.
      memory: bytes of its HBM that a program can have.
      memory_bandwidth: bytes a second between it and its HBM.
      link: bytes a second that one link carries one way; a GPU has one, into its host's switch.
      links: of a device, to its neighbours; as many as sides of the grid times two.
      network: bytes a second that a device has of its host's network one way, to other hosts (GPU) or slices (TPU).
      host_memory: bytes of its host's memory that are there for one device.
      host_link: bytes a second between the device and its host's memory, one way.
      sources: field -> where its figure comes from; every figure has one.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_bandwidth: float
    link: float
    links: int
    network: float
    host_memory: float
    host_link: float
    sources: dict[str, str]

    @property
    def platform(self) -> str:
        """The platform as JAX names it: "tpu" or "gpu"."""
        return "tpu" if self.name.startswith(("v", "tpu")) else "gpu"


_BOOK = "jax-ml.github.io/scaling-book/tpus: one way, one link"
_BOOK_HOST = "jax-ml.github.io/scaling-book/tpus: PCIe of a chip"
_BOOK_NETWORK = "jax-ml.github.io/scaling-book/tpus: data-centre network of a chip"


_TPU7X = "cloud.google.com/tpu/docs/tpu7x"
_SOURCES_OF_TPU7X = {
    "link": f"{_TPU7X}, a sixth of what it states for a chip, half of it one way",
    "network": _TPU7X,
    "host_link": "assumed to be that of the TPUs before it",
}


def _tpu(name: str, page: str, sources: Mapping[str, str] = types.MappingProxyType({}), **fields) -> Chip:
    docs = f"cloud.google.com/tpu/docs/{page}"
    found = dict.fromkeys(("flops", "memory_bandwidth", "links"), docs)
    found |= {
        "memory": "what the compiler of libtpu 0.0.42 lets a program have",
        "link": _BOOK,
        "network": _BOOK_NETWORK,
        "host_link": _BOOK_HOST,
        "host_memory": f"{docs}, a machine's memory over its chips",
    }
    return Chip(name=name, sources=found | dict(sources), **fields)


def _gpu(name: str, sheet: str, machine: str, **fields) -> Chip:
    sources = dict.fromkeys(("flops", "memory_bandwidth"), f"NVIDIA {sheet} datasheet, SXM, without sparsity")
    sources |= {
        "memory": f"NVIDIA {sheet}: {GPU_MEMORY_FRACTION:g} of what its driver leaves to programs, by "
        f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MEMORY_FRACTION:g}; JAX takes 0.75 unless that is set",
        "link": f"NVIDIA {sheet} datasheet: NVLink, half of what it states for both ways",
        "links": "one, into the NVSwitch",
        "network": f"NVIDIA {machine} user guide: one InfiniBand adapter for each GPU",
        "host_link": f"NVIDIA {sheet} datasheet: PCIe, half of what it states for both ways",
        "host_memory": f"NVIDIA {machine} user guide: the system's memory over its GPUs",
    }
    return Chip(name=name, links=1, sources=sources, **fields)


CHIPS = types.MappingProxyType(
    {
        chip.name: chip
        for chip in (
            _tpu(
                "v3",
                "v3",  # 123 TFLOP/s, 32 GiB, 900 GB/s and four links a chip, of which a device is one of two cores
                kinds=("TPU v3",),
                flops=61.5e12,
                memory=15.48 * GiB,
                memory_bandwidth=450 * GB,
                link=100 * GB,
                links=4,
                network=1.56 * GB,
                host_memory=42 * GB,
                host_link=16 * GB,
            ),
            _tpu(
                "v4",
                "v4",
                kinds=("TPU v4",),
                flops=275e12,
                memory=30.75 * GiB,
                memory_bandwidth=1228 * GB,
                link=45 * GB,
                links=6,
                network=3.1 * GB,
                host_memory=100 * GB,
                host_link=16 * GB,
            ),
            _tpu(
                "v5e",
                "v5e",
                kinds=("TPU v5 lite", "TPU v5e"),
                flops=197e12,
                memory=15.75 * GiB,
                memory_bandwidth=819 * GB,
                link=45 * GB,
                links=4,
                network=3.1 * GB,
                host_memory=64 * GiB,
                host_link=16 * GB,
            ),
            _tpu(
                "v5p",
                "v5p",
                kinds=("TPU v5",),  # JAX names it without the p, newer libtpus with it; after v5e in this table
                flops=459e12,
                memory=95.74 * GiB,
                memory_bandwidth=2765 * GB,
                link=90 * GB,
                links=6,
                network=6.25 * GB,
                host_memory=112 * GB,
                host_link=16 * GB,
            ),
            _tpu(
                "v6e",
                "v6e",
                kinds=("TPU v6 lite", "TPU v6e"),
                flops=918e12,
                memory=31.25 * GiB,
                memory_bandwidth=1638 * GB,
                link=90 * GB,
                links=4,
                network=12.5 * GB,
                host_memory=192 * GiB,
                host_link=16 * GB,
            ),
            _tpu(
                "tpu7x",
                "tpu7x",  # 2,307 TFLOP/s, 192 GiB, 7,380 GB/s, six links a chip, of which a device is one of two cores
                kinds=("TPU7x",),
                flops=1153.5e12,
                memory=94.75 * GiB,
                memory_bandwidth=3690 * GB,
                link=100 * GB,
                links=6,
                network=6.25 * GB,
                host_memory=120 * GB,
                host_link=16 * GB,
                sources=_SOURCES_OF_TPU7X,
            ),
            _gpu(
                "a100",
                "A100 80GB",
                "DGX A100",
                kinds=("A100",),
                flops=312e12,
                memory=GPU_MEMORY_FRACTION * 79.1 * GiB,
                memory_bandwidth=2039 * GB,
                link=300 * GB,
                network=25 * GB,
                host_memory=250 * GB,
                host_link=32 * GB,
            ),
            _gpu(
                "h100",
                "H100",
                "DGX H100",
                kinds=("H100 80GB HBM3",),
                flops=989.4e12,
                memory=GPU_MEMORY_FRACTION * 79.1 * GiB,
                memory_bandwidth=3352 * GB,
                link=450 * GB,
                network=50 * GB,
                host_memory=250 * GB,
                host_link=64 * GB,
            ),
            _gpu(
                "h200",
                "H200",
                "DGX H200",
                kinds=("H200",),
                flops=989.4e12,
                memory=GPU_MEMORY_FRACTION * 139.7 * GiB,
                memory_bandwidth=4800 * GB,
                link=450 * GB,
                network=50 * GB,
                host_memory=250 * GB,
                host_link=64 * GB,
            ),
        )
    }
)
"""Name -> Chip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Fractions of the published peak that programs reach.

    Attributes:
      matmul: dense layers.
      attention: a fused attention kernel forward, counting the pairs that the mask shows.
      attention_backward: the same backward, at 2.5 times the operations.
      source: where they come from.
    """

    matmul: float
    attention: float
    attention_backward: float
    source: str


EFFICIENCY = {
    "gpu": Efficiency(
        matmul=0.7,
        attention=0.59,
        attention_backward=0.52,
        source="attention: cuDNN on H100, 567-608 and 488-534 of 989 TFLOP/s (FlashAttention-3 paper); "
        "dense layers: 697 of 989, measured by scripts/doctor.py",
    ),
    "tpu": Efficiency(
        matmul=0.7,
        attention=0.59,
        attention_backward=0.52,
        source="assumed to be as on H100; MaxText reports 52-53% of the peak for whole steps on v5p",
    ),
}
"""Platform -> Efficiency."""

H800 = dataclasses.replace(CHIPS["h100"], name="h800", link=200 * GB)
"""An H100 whose NVLink is cut to 400 GB/s both ways. It is not in the table: only published comparisons need it."""


def chip_of(device_kind: str) -> Chip | None:
    """Find the chip of a JAX device's `device_kind`; None if it is not in the table."""
    return next((chip for chip in CHIPS.values() if any(kind in device_kind for kind in chip.kinds)), None)
