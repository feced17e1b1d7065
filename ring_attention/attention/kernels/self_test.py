"""Does a fused kernel compute on this device what the XLA tiles compute there? Asked once for each kind of device.

The kernels call what is private to JAX and to vendors' libraries, whose releases have had wrong gradients before. So
the first time that `impl="auto"` would take one, it computes two block pairs of a ring of two, forward and backward,
and the XLA tiles compute the same. These are small: once compiled they take milliseconds.

The verdict is kept in the user's cache folder (see `verdicts`). RING_ATTENTION_SELF_TEST=off in the environment leaves
the test out: the kernel is then trusted. In a run of several processes each tests a device of its own; the test has no
randomness, so that processes on equal machines get the same verdict, and `training.run` refuses a run in which they
differ, whose programs would wait for each other for ever.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.attention import online_softmax
from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.device_kind import DeviceKind
from ring_attention.attention.kernels import KERNELS, verdicts
from ring_attention.attention.kernels.contract import GlobalStats, Kernel
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import BlockPair, Runs, Tokens
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.checks import one_line, require_choice

_log = logging.getLogger(__name__)

SWITCH = "RING_ATTENTION_SELF_TEST"
"""The environment variable that switches the test "on", the default, or "off"."""

TOLERANCE = 0.02
"""Largest distance from the XLA tiles: of out, dq, dk and dv in units of theirs (Frobenius norms), of lse in nats."""

B, H, K, D, t = 1, 2, 1, 128, 128
SCALE = 2 * D**-0.5
"""Of the scores, so that their standard deviation is 2: with sharper ones a single key counts for more."""

RESULTS = ("out", "lse", "dq", "dk", "dv")


class Inputs(NamedTuple):
    """q and dout [B,H,t,D] of the second device, k and v [B,K,2t,D] of both; bfloat16."""

    q: jax.Array
    dout: jax.Array
    k: jax.Array
    v: jax.Array


def failure_of(kernel: Kernel, kind: DeviceKind) -> str | None:
    """Say what the kernel gets wrong on devices of this kind; None if nothing, or if that is not known.

    It is not known where the test is switched off, and where this process has no such device: programs are compiled
    for a pod that is not there.
    """
    setting = os.environ.get(SWITCH, "on")
    require_choice(SWITCH, setting, ["on", "off"])
    return _failure_of(kernel, kind) if setting == "on" else None


@functools.cache
def _failure_of(kernel: Kernel, kind: DeviceKind) -> str | None:
    """Find the verdict in the cache folder, or by the test; once in a process."""
    device = _local_device(kind)
    if device is None:
        return None
    key = verdicts.key_of(kernel.name, device)
    known = verdicts.read(key)
    if known is None:
        _log.info("attention kernel: testing %s on %s, once", kernel.name, kind)
        try:
            known = _in_new_thread(lambda: difference(kernel, device))
        except Exception as error:  # each compiler raises its own
            # Not kept: it may have been for want of memory, and gone the next time.
            return f"its self-test raised {type(error).__name__}: {one_line(error)[:300]}; {_remedy(kernel)}"
        verdicts.write(key, known)
    if not known:
        return None
    where = verdicts.path_of(key)
    return f"its self-test found {known}; {_remedy(kernel)}, or delete {where} to have it tested again"


def _remedy(kernel: Kernel) -> str:
    return f'try other versions of JAX and its plugin (docs/kernels.md), or name impl="{kernel.name}" to take it anyway'


def difference(kernel: Kernel, device: jax.Device) -> str:
    """Say how far the kernel's results on this device are from those of the XLA tiles; "" where TOLERANCE allows it."""
    got = jax.jit(functools.partial(_by_hops, kernel))(jax.device_put(_inputs(), device))
    for name, x, y in zip(RESULTS, (np.asarray(x, np.float64) for x in got), _of_tiles(device), strict=True):
        error = np.abs(x - y).max() if name == "lse" else np.linalg.norm(x - y) / np.linalg.norm(y)
        if not error <= TOLERANCE:  # NaN, too
            unit = "nats" if name == "lse" else "of its size"
            return f"{name} {error:.2g} {unit} from that of the XLA tiles, at most {TOLERANCE} is allowed"
    return ""


def _inputs() -> Inputs:
    rng = np.random.default_rng(0)
    shapes = [(B, H, t, D)] * 2 + [(B, K, 2 * t, D)] * 2
    return Inputs(*(jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for shape in shapes))


def _tokens(start: int, stop: int) -> Tokens:
    """Tokens of the contiguous layout; a shard may be the first or the second."""
    starts = ((0,), (t,)) if stop - start == t else ((0,),)
    return Tokens(jnp.arange(start, stop, dtype=jnp.int32)[None], runs=Runs((stop - start,), 1, starts))


def _by_hops(kernel: Kernel, inputs: Inputs) -> list[jax.Array]:
    """Compute what RESULTS names, as the second device of the ring does: its own keys, then those of the first one."""
    (q, dout, *kv), mask, blocks = inputs, MaskSpec(scale=SCALE), BlockSizes(q=t, kv=t)
    here, before = _tokens(t, 2 * t), _tokens(0, t)
    hops = [
        (BlockPair(here, here, mask, diagonal=True), [x[:, :, t:] for x in kv]),
        (BlockPair(here, before, mask), [x[:, :, :t] for x in kv]),
    ]
    state = SoftmaxState.empty(q.shape)
    for pair, keys in hops:
        state = kernel.forward(q, *keys, pair, state, blocks)
    out, lse = online_softmax.finalize(state)
    stats, dq, of_keys = GlobalStats.of(out.astype(q.dtype), lse, dout), jnp.zeros(q.shape, jnp.float32), []
    for pair, keys in hops:
        dq, *dkv = kernel.backward(q, *keys, stats, pair, dq, blocks)
        of_keys.append(dkv)
    return [out, lse, dq, *(jnp.concatenate(parts, 2) for parts in zip(*reversed(of_keys), strict=True))]


@functools.cache
def _of_tiles(device: jax.Device) -> list[np.ndarray]:
    """The same, computed by the XLA tiles as one block pair: all keys at once."""
    tiles, pair = KERNELS["xla"], BlockPair(_tokens(t, 2 * t), _tokens(0, 2 * t), MaskSpec(scale=SCALE))
    blocks = BlockSizes(q=t, kv=2 * t, cut=1)

    def attend(inputs: Inputs) -> list[jax.Array]:
        q, dout, k, v = inputs
        out, lse = online_softmax.finalize(tiles.forward(q, k, v, pair, SoftmaxState.empty(q.shape), blocks))
        stats = GlobalStats.of(out.astype(q.dtype), lse, dout)
        return [out, lse, *tiles.backward(q, k, v, stats, pair, jnp.zeros(q.shape, jnp.float32), blocks)]

    return [np.asarray(x, np.float64) for x in jax.jit(attend)(jax.device_put(_inputs(), device))]


def _local_device(kind: DeviceKind) -> jax.Device | None:
    """Find a device of this kind on which this process can compute."""
    try:
        devices = jax.local_devices(backend=kind.platform)
    except RuntimeError:  # this process has no such backend: the devices are there to be compiled for
        return None
    return next((device for device in devices if device.device_kind == kind.name), None)


def _in_new_thread(work: Callable[[], str]) -> str:
    """The result of `work`, done in a thread of its own.

    JAX keeps for each thread what is being traced, the mesh that is set and settings of contexts. A call of attention
    is mostly traced, inside a `jit` or a `shard_map`: what is computed there would become part of that program.
    """
    found: list[str] = []
    errors: list[BaseException] = []

    def run():
        try:
            found.append(work())
        except BaseException as error:  # whatever it is, it belongs to the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run, name="attention self-test")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]
