"""What `impl="auto"` takes: the fastest kernel that can do what is asked, on devices where it passed its self-test."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

from ring_attention.attention.device_kind import DeviceKind
from ring_attention.attention.kernels import KERNELS, find_kernel, self_test
from ring_attention.attention.kernels.contract import Kernel

_log = logging.getLogger(__name__)

FUSED = {"tpu": ("splash",), "gpu": ("cudnn", "tokamax")}
"""Platform -> the names of its fused kernels, the fastest first. On other platforms "xla" is the fastest there is."""


class Choice(NamedTuple):
    """A kernel and why it is that one.

    Attributes:
      impl: name of the kernel.
      missed: names of faster ones that run on this platform, "" if there is none or the kernel is one of them.
      reason: why it is none of these, in the words of the checks that they failed; "" if nothing is missed.
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
    left = {}
    for name in FUSED.get(kind.platform or "", ()):
        left[name] = _why_not(KERNELS[name], kind, accepts, failure_of)
        if left[name] is None:
            return Choice(name)
    words = [f"{name}: {why}" for name, why in left.items()] if len(left) > 1 else list(left.values())
    return Choice("xla", " or ".join(left), "; ".join(words))


def _why_not(kernel: Kernel, kind: DeviceKind, accepts: Callable, failure_of: Callable) -> str | None:
    """Why a fused kernel of these devices cannot be taken; None if it can."""
    if kind.is_amd:
        return f'impl="{kernel.name}" is for GPUs of NVIDIA'
    try:
        accepts(kernel)
    except ValueError as error:
        return str(error)
    return failure_of(kernel, kind)


def self_tests(kind: DeviceKind, accepts: Callable[[Kernel], None] = lambda kernel: None) -> dict[str, str]:
    """Test the fused kernels of these devices until one passes: {"self-test of NAME": how it went}.

    That is "passed", "failed", or "not asked" of a kernel that `accepts` refuses, as in `choose_kernel`. Processes that
    compute together must find the same, or they would trace different programs.
    """
    found: dict[str, str] = {}

    def failure_of(kernel: Kernel, kind: DeviceKind) -> str | None:
        failure = self_test.failure_of(kernel, kind)
        found[kernel.name] = "failed" if failure else "passed"
        return failure

    def asked(kernel: Kernel) -> None:
        found[kernel.name] = "not asked"
        accepts(kernel)

    if not kind.is_amd:
        choose(kind, asked, failure_of)
    return {f"self-test of {name}": how for name, how in found.items()}


@functools.cache
def log_once(choice: Choice, kind: DeviceKind) -> None:
    """Log a choice the first time that it is made: INFO, and WARNING where a faster kernel was left."""
    if choice.missed:
        words = "attention kernel: %s on %s, where %s would be faster: %s"
        _log.warning(words, choice.impl, kind, choice.missed, choice.reason)
    else:
        _log.info("attention kernel: %s on %s", choice.impl, kind)
