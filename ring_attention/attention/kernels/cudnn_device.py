"""What the GPU and the cuDNN at hand can do of attention, and what versions of cuDNN do wrong."""

from typing import NamedTuple

import jax

from ring_attention.checks import require

AMPERE, HOPPER, BLACKWELL_ULTRA = (8, 0), (9, 0), (10, 3)

_REMEDY = 'install another with pip install -U nvidia-cudnn-cu12, or use impl="xla"'


class Gpu(NamedTuple):
    """What computes.

    Attributes:
      stack: as JAX's backend says it, such as "cuda 12080" or "rocm 60300".
      capability: compute capability, such as (9, 0); None where it is not known.
      cudnn: version as cuDNN has it, such as 91001 for 9.10.1; None where it is not known.
    """

    stack: str
    capability: tuple[int, int] | None
    cudnn: int | None

    @property
    def version(self) -> str:
        """Of cuDNN, as it is written."""
        assert self.cudnn is not None
        return f"{self.cudnn // 10000}.{self.cudnn // 100 % 100}.{self.cudnn % 100}"


def gpu_here(library) -> Gpu | None:
    """The GPU of the default backend; None without one, where programs are only lowered or compiled for another.

    `library` is JAX's module of cuDNN's attention.
    """
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return None
    parts = str(getattr(device, "compute_capability", "")).split(".")  # of ROCm it is a name
    capability = (int(parts[0]), int(parts[1])) if len(parts) == 2 and "".join(parts).isdigit() else None
    try:
        cudnn = library.check_cudnn_version()
    except (AttributeError, RuntimeError):  # JAX's for another stack, or no cuDNN
        cudnn = None
    return Gpu(device.client.platform_version, capability, cudnn)


def require_gpu(gpu: Gpu | None, head_dim: int, window: int | None) -> None:
    """Raise ValueError for what this GPU, or this cuDNN, cannot compute or is known to compute wrongly.

    Without a GPU the most is allowed that any of them can, since the program is for a device that is not here.
    """
    largest = 128 if gpu is not None and gpu.capability is not None and gpu.capability < HOPPER else 256
    where = "" if largest == 256 else f" before Hopper, and this GPU is of compute capability {_shown(gpu)}"
    require(
        head_dim % 8 == 0 and head_dim <= largest,
        f'impl="cudnn" takes head dims that are multiples of 8, at most {largest}{where}, got {head_dim}; '
        'use impl="xla"',
    )
    if gpu is None:
        return
    require(
        "cuda" in gpu.stack.lower(),
        f'impl="cudnn" needs CUDA, but the backend is {gpu.stack.strip()!r}; use impl="xla"',
    )
    require(
        gpu.capability is None or gpu.capability >= AMPERE,
        f'impl="cudnn" needs compute capability 8.0, but this GPU has {_shown(gpu)}; use impl="xla"',
    )
    require(gpu.cudnn is not None, f'impl="cudnn" needs cuDNN, and JAX finds none; {_REMEDY}')
    assert gpu.cudnn is not None
    require(
        gpu.capability != BLACKWELL_ULTRA or gpu.cudnn >= 91100,
        f'impl="cudnn" on compute capability 10.3 needs cuDNN 9.11, but this is {gpu.version}; {_REMEDY}',
    )
    require(
        window is None or gpu.cudnn != 91400,
        f'impl="cudnn" with a window needs another cuDNN than 9.14.0, whose windows are wrong; {_REMEDY}',
    )


def require_gradients(gpu: Gpu | None) -> None:
    """Raise ValueError for a cuDNN that has no backward pass in half precision."""
    require(
        gpu is None or gpu.cudnn not in (91000, 91001),
        'impl="cudnn" has no gradients with cuDNN 9.10.0 and 9.10.1, which refuse each backward pass in half '
        f"precision, and this is {'' if gpu is None or gpu.cudnn is None else gpu.version}; {_REMEDY}",
    )


def _shown(gpu: Gpu | None) -> str:
    return "" if gpu is None or gpu.capability is None else ".".join(map(str, gpu.capability))
