"""Published figures of TPUs, with their sources; where none is published the source says so."""

import types
from collections.abc import Mapping

from ring_attention.hardware.chip import GB, Chip, GiB

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
    return Chip(name=name, platform="tpu", sources=found | dict(sources), **fields)


TPUS = (
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
        kinds=("TPU v5", "TPU v5p"),  # JAX names it without the p, newer libtpus with it
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
)
"""In the order in which they came."""
