"""Which derivatives attention has: gradients, and tangents of gradients. The others are refused in words.

JAX refuses them too, but speaks of loops and of functions that nobody outside has heard of.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

FORWARD_MODE = (
    "forward-mode differentiation (jax.jvp, jax.jacfwd, jax.linearize) of attention is not there, need reverse mode; "
    "use jax.grad or jax.vjp, or jax.jvp of the gradient for a Hessian"
)
TWICE = (
    "the gradient of a gradient of attention was asked for in reverse mode twice, need forward mode around it; use "
    "jax.jvp(jax.grad(fn), ...) for a product with the Hessian, or jax.hessian(fn)"
)

_once_p = Primitive("differentiated_once")
"""The identity, whose tangents go through and whose transpose is refused."""


def differentiated_once(x: jax.Array | None) -> jax.Array | None:
    """`x`, a gradient: forward mode goes through it, and reverse mode is refused in words with a TypeError."""
    return None if x is None else _once_p.bind(x)


@contextlib.contextmanager
def only_reverse_mode() -> Iterator[None]:
    """Raise TypeError in our words where a call within meets forward mode."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(FORWARD_MODE) from None


def _refuse(cotangent, x):
    raise TypeError(TWICE)


_once_p.def_impl(lambda x: x)
_once_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_once_p, _refuse)
batching.defvectorized(_once_p)
mlir.register_lowering(_once_p, lambda ctx, x: [x])
