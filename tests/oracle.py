"""What the numerics tests share: random inputs, the float64 oracle's errors, and the bound on them."""

from ring_attention.testing import (
    NAMES,
    dense_attention,
    errors,
    oracle,
    out_and_gradients,
    random_qkv,
    random_segments,
    relative_error,
)

__all__ = [
    "NAMES",
    "assert_as_exact_as_dense",
    "dense_attention",
    "dense_errors",
    "oracle",
    "out_and_gradients",
    "random_qkv",
    "random_segments",
    "relative_error",
]


def dense_errors(q, k, v, dout, **mask):
    """Relative errors of (out, dq, dk, dv) of `dense_attention` against the oracle."""
    got = out_and_gradients(lambda q, k, v: dense_attention(q, k, v, **mask), q, k, v, dout)
    return errors(got, oracle(q, k, v, dout, **mask))


def assert_as_exact_as_dense(got, q, k, v, dout, **mask):
    """Each of (out, dq, dk, dv) is at most twice as far from the oracle as a dense implementation in the same dtype."""
    bounds = dense_errors(q, k, v, dout, **mask)
    for name, error, bound in zip(NAMES, errors(got, oracle(q, k, v, dout, **mask)), bounds, strict=True):
        assert error <= 2 * bound, f"{name}: relative error {error:.2e}, dense has {bound:.2e}"
