"""What is said of an accelerator in plans."""

import dataclasses

GB, GiB = 1e9, 2**30

GPU_MEMORY_FRACTION = 0.92
"""Of a GPU's memory that JAX is told to take, by XLA_PYTHON_CLIENT_MEM_FRACTION in the job files: by itself it takes
0.75. The rest is left to CUDA, cuDNN and NCCL, which allocate beside it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device: a TPU chip (of v3 and tpu7x, a core: half a chip) or a GPU.

    Attributes:
      name: as a topology begins, such as "v5e".
      platform: as JAX names it, "tpu" or "gpu".
      kinds: JAX's names of such devices (`device_kind`), whole: of no two chips one.
      flops: dense bfloat16 operations a second, the published peak.
      memory: bytes of its HBM that a program can have.
      memory_bandwidth: bytes a second between it and its HBM.
      link: bytes a second that one link carries one way.
      links: of a device, to its neighbours: of a TPU as many as sides of the grid times two; of a GPU one, into its
        host's switch, or one to each other GPU of its host.
      network: bytes a second that a device has of its host's network one way, to other hosts (GPU) or slices (TPU).
      host_memory: bytes of its host's memory that are there for one device.
      host_link: bytes a second between the device and its host's memory, one way.
      sources: field -> where its figure comes from; every figure has one.
    """

    name: str
    platform: str
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
