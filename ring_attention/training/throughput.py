"""How many floating-point operations a second the machine can do at most."""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ring_attention.parallel.chips import chip_of


def machine_peak_flops(devices: Sequence[jax.Device]) -> tuple[float | None, str]:
    """Return (operations a second of all `devices` together, where the figure comes from).

    Accelerators: the published dense bfloat16 peak. CPU: the best float32 matrix product, measured once in less than a
    second; simulated devices share the cores, so their number does not count. An accelerator that is not in the table
    gives (None, the reason).
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return _measure_cpu(), "measured: a float32 matrix product on all cores"
    if chip := chip_of(kind):
        return chip.flops * len(devices), f"published bfloat16 peak of {len(devices)} x {kind}"
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
