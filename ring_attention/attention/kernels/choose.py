"""What `impl="auto"` takes: the fastest kernel that can do what is asked, on devices where it passed its self-test."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

from ring_attention.attention.device_kind import DeviceKind
from ring_attention.attention.kernels import KERNELS, find_kernel, self_test
from ring_attention.attention.kernels.contract import Kernel

_log = logging.getLogger(__name__)

FUSED = {"tpu": "splash", "gpu": "cudnn"}
"""Platform -> the name of its fused kernel. On other platforms "xla" is the fastest there is."""


class Choice(NamedTuple):
    """A kernel and why it is that one.

    Attributes:
      impl: name of the kernel.
      missed: name of a faster one that runs on this platform, "" if there is none.
      reason: why it is not that one, in the words of the check that it failed; "" if there is none.
    """

    impl: str
    missed: str = ""
    reason: str = ""


def choose_kernel(impl: str, kind: DeviceKind, accepts: Callable[[Kernel], None]) -> Kernel:
    """Find the kernel called `impl`, or the fastest one for what is asked, where that is "auto".

    A name is taken at its word: whether that kernel can do it is checked where it is called, and it never gives way to
    another. What "auto" takes is logged once, as a warning where a fused kernel of the platform had to be left.

    Args:
      impl: "auto" or the name of a kernel.
      kind: of the devices that compute.
      accepts: called with a kernel; raises ValueError, in words, if it cannot do what is asked.

    Raises:
      ValueError: for a name that is not known.
    """
    if impl != "auto":
        return find_kernel(impl)
    choice = choose(kind, accepts, self_test.failure_of)
    log_once(choice, kind)
    return KERNELS[choice.impl]


def choose(
    kind: DeviceKind, accepts: Callable[[Kernel], None], failure_of: Callable[[Kernel, DeviceKind], str | None]
) -> Choice:
    """Choose the kernel of "auto"; the arguments are those of `choose_kernel`.

    `failure_of` says what a kernel gets wrong on these devices, None if nothing or nothing that is known. It is asked
    for kernels that would be taken, and for no others.
    """
    fused = FUSED.get(kind.platform or "")
    if fused is None:
        return Choice("xla")
    if kind.is_amd:
        return Choice("xla", fused, f'impl="{fused}" is for GPUs of NVIDIA')
    try:
        accepts(KERNELS[fused])
    except ValueError as error:
        return Choice("xla", fused, str(error))
    failure = failure_of(KERNELS[fused], kind)
    return Choice("xla", fused, failure) if failure else Choice(fused)


def self_tests(kind: DeviceKind) -> dict[str, str]:
    """Test the fused kernel of these devices, if there is one: {"self-test of NAME": "passed" or "failed"}.

    Processes that compute together must find the same, or they would trace different programs.
    """
    fused = FUSED.get(kind.platform or "")
    if fused is None or kind.is_amd:
        return {}
    return {f"self-test of {fused}": "failed" if self_test.failure_of(KERNELS[fused], kind) else "passed"}


@functools.cache
def log_once(choice: Choice, kind: DeviceKind) -> None:
    """Log a choice the first time that it is made: INFO, and WARNING where a faster kernel was left."""
    if choice.missed:
        words = "attention kernel: %s on %s, where %s would be faster: %s"
        _log.warning(words, choice.impl, kind, choice.missed, choice.reason)
    else:
        _log.info("attention kernel: %s on %s", choice.impl, kind)
