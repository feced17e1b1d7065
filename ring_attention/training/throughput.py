"""How many floating-point operations a second the machine can do at most."""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Dense bfloat16 operations a second of one JAX device, by a word of its `device_kind`; the first that matches counts.
_PEAKS = (
    # cloud.google.com/tpu/docs/v3: 123 TFLOP/s a chip, and each of its two cores is a device.
    ("TPU v3", 61.5e12),
    ("TPU v4", 275e12),  # cloud.google.com/tpu/docs/v4; the two cores of a chip are one device
    ("TPU v5 lite", 197e12),  # cloud.google.com/tpu/docs/v5e
    ("TPU v5e", 197e12),  # the same
    ("TPU v5", 459e12),  # cloud.google.com/tpu/docs/v5p; JAX names it without the p, newer libtpus with it
    ("TPU v6 lite", 918e12),  # cloud.google.com/tpu/docs/v6e
    ("TPU v6e", 918e12),  # the same
    ("A100", 312e12),  # NVIDIA A100 datasheet, SXM and PCIe alike, without sparsity
    ("H100 80GB HBM3", 989.4e12),  # NVIDIA H100 datasheet, SXM: 1,979 with sparsity, half of it without
    ("H200", 989.4e12),  # NVIDIA H200 datasheet, SXM: as the H100
)


def machine_peak_flops(devices: Sequence[jax.Device]) -> tuple[float | None, str]:
    """Return (operations a second of all `devices` together, where the figure comes from).

    Accelerators: the published dense bfloat16 peak. CPU: the best float32 matrix product, measured once in less than a
    second; simulated devices share the cores, so their number does not count. An accelerator that is not in the table
    gives (None, the reason).
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return _measure_cpu(), "measured: a float32 matrix product on all cores"
    for word, peak in _PEAKS:
        if word in kind:
            return peak * len(devices), f"published bfloat16 peak of {len(devices)} x {kind}"
    return None, f"no published peak is known here for {kind!r}"


@functools.cache
def _measure_cpu(size: int = 2048, runs: int = 3) -> float:
    """Return the best rate of `runs` products of two [size, size] float32 matrices."""
    device = jax.devices("cpu")[0]
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
