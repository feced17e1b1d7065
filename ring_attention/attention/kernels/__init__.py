"""The kernels that compute a pair of query and key blocks, by name; `contract` says what each of them promises."""

from ring_attention.attention.kernels import tiling, xla
from ring_attention.attention.kernels.contract import Kernel
from ring_attention.attention.kernels.cudnn import CUDNN
from ring_attention.attention.kernels.splash import SPLASH
from ring_attention.attention.kernels.tokamax import TOKAMAX
from ring_attention.checks import require, require_choice

KERNELS = {
    "xla": Kernel("xla", xla.forward, xla.backward, halve=tiling.halve, float32_out=True),
    "splash": SPLASH,
    "cudnn": CUDNN,
    "tokamax": TOKAMAX,
}


def find_kernel(impl: str) -> Kernel:
    """The kernel called `impl`; for "auto" that which can do everything everywhere.

    What "auto" takes where attention is computed, `choose.choose_kernel` says: this kernel, or a faster one.
    """
    require_choice("impl", impl, ["auto", *KERNELS])
    return KERNELS["xla" if impl == "auto" else impl]


def require_platform(kernel: Kernel, platform: str | None) -> None:
    """Raise ValueError unless the kernel runs on devices of this platform, as `jax.Device.platform` has it.

    None, for devices that are not known yet, is any platform.
    """
    require(
        platform is None or kernel.platform in (None, platform),
        f'impl={kernel.name!r} runs on {kernel.platform} devices, but these are {platform}; use impl="auto"',
    )
