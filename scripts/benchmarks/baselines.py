"""Attention as others compute it and as we do, ready to be timed side by side on the same arrays."""

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ring_attention.doctor.timing import System
from ring_attention.parallel.context import ring_attention
from ring_attention.parallel.layouts import SequenceLayout

PAPER, DENSE, TORCH = "the paper's code", "jax.nn.dot_product_attention, 1 device", "PyTorch CPU flash SDPA"
MATMUL_SIZE = 2048
MATMUL = f"matmul {MATMUL_SIZE} x {MATMUL_SIZE}"


def with_gradients(attend: Callable, backward: bool) -> Callable:
    """`attend` over (q, k, v, dout) as one compiled program: [out], with `backward` [out, dq, dk, dv]."""

    def run(q, k, v, dout):
        if not backward:
            return [attend(q, k, v)]
        out, vjp = jax.vjp(attend, q, k, v)
        return [out, *vjp(dout)]

    return jax.jit(run)


def jax_system(name: str, attend: Callable, arrays, backward: bool, natural: Callable = np.asarray) -> System:
    """A System of a JAX function of q, k, v."""
    run = with_gradients(attend, backward)
    return System(name, lambda: jax.block_until_ready(run(*arrays)), lambda results: [natural(x) for x in results])


def ours(name: str, layout_kind: str, arrays, mesh, backward: bool, segment_ids=None, **mask) -> System:
    """Ring attention in one layout; tokens are dealt before the clock runs, as a loader does."""
    layout = SequenceLayout(layout_kind, mesh.shape["sp"])
    sharding = jax.NamedSharding(mesh, jax.P(None, "sp"))
    dealt = [jax.device_put(layout.permute(x, axis=1), sharding) for x in arrays]
    if segment_ids is not None:
        mask["segment_ids"] = jax.device_put(layout.permute(segment_ids, axis=1), sharding)
    attend = functools.partial(ring_attention, mesh=mesh, layout=layout, **mask)
    return jax_system(name, attend, dealt, backward, lambda x: layout.unpermute(np.asarray(x), 1))


def load_paper() -> object | None:
    """Return the module `ringattention_jax` of the paper's package; None where that is not installed.

    It is loaded by its path, because the package itself does not import on this JAX.
    """
    try:
        path = importlib.metadata.distribution("ringattention").locate_file("ringattention/ringattention_jax.py")
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location("ringattention_jax", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paper(module, chunk: int, arrays, mesh, backward: bool) -> System:
    """Return the paper's ring attention with chunks of this many tokens.

    It knows no grouped queries: key/value heads are repeated for the query heads that they serve, as its users have to.
    """
    settings = dict(query_chunk_size=chunk, key_chunk_size=chunk, causal_block_size=1, deterministic=True)
    settings |= dict(dropout_rng=None, attn_pdrop=0.0, dtype=jnp.float32, precision=None, prevent_cse=False)
    settings |= dict(policy=jax.checkpoint_policies.nothing_saveable)
    groups = arrays[0].shape[2] // arrays[1].shape[2]

    def on_shard(q, k, v, bias):
        k, v = (x if groups == 1 else jnp.repeat(x, groups, axis=2) for x in (k, v))
        return module.ring_attention(q, k, v, bias, None, None, "sp", True, settings)

    B, T = arrays[0].shape[:2]
    spec = jax.P(None, "sp")
    sharded = jax.shard_map(on_shard, mesh=mesh, in_specs=(spec, spec, spec, jax.P()), out_specs=spec, check_vma=False)
    bias = jnp.zeros((B, 1, 1, T), jnp.float32)
    dealt = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in arrays]
    return jax_system(f"{PAPER}, chunk {chunk}", lambda q, k, v: sharded(q, k, v, bias), dealt, backward)


def dense(arrays, backward: bool) -> System:
    """JAX's own attention on one device."""
    return jax_system(DENSE, functools.partial(jax.nn.dot_product_attention, is_causal=True), arrays, backward)


def pytorch(arrays, backward: bool) -> System | None:
    """PyTorch's flash attention on the CPU, on all cores as JAX; None where torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count())
    heads_first = [torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in arrays]
    inputs, dout = [x.requires_grad_(backward) for x in heads_first[:3]], heads_first[3]

    def run():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        return [out, *torch.autograd.grad(out, inputs, dout)] if backward else [out]

    return System(TORCH, run, lambda results: [x.detach().transpose(1, 2).numpy() for x in results])


def matmul() -> System:
    """A plain float32 product of two square matrices."""
    matrix, multiply = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.float32), jax.jit(jnp.matmul)
    return System(MATMUL, lambda: jax.block_until_ready(multiply(matrix, matrix)))
