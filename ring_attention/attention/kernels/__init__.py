"""The kernels that compute a hop, by name; `contract` says what each of them promises."""

import logging

from ring_attention.attention.kernels import xla
from ring_attention.attention.kernels.contract import Kernel
from ring_attention.checks import require_choice

_log = logging.getLogger(__name__)

KERNELS = {"xla": Kernel("xla", xla.forward, xla.backward)}


def find_kernel(impl: str) -> Kernel:
    """The kernel called `impl`; "auto" takes the best that runs here and logs which."""
    require_choice("impl", impl, ["auto", *KERNELS])
    if impl == "auto":
        impl = "xla"
        _log.info("attention kernel: %s", impl)
    return KERNELS[impl]
