"""Exact attention over sequences too long for one accelerator.

Letters, in names of arrays and in einsums:
  B batch, T query tokens, S key tokens, H query heads, K key/value heads, G = H/K, D head dim, P ring size,
  M model dim, F feed-forward dim, V vocabulary, L layers. Capitals are global sizes, lower case this device's share
  (`q_BTHD`, `q_BtHD`); inside a kernel r, n are rows and tiles of queries, s, m those of keys.
Mesh axes: dp data, fsdp sharded data (parameters too), sp sequence (the ring), tp tensor.
A hop is one step of the ring, a shard one device's slice of the sequence, a tile the block a kernel works on at once, a
layout the order in which tokens are dealt to shards. lse is a float32 natural logarithm, -inf where a query sees no
key.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors and type checkers see; `_MODULES` says the same to `__getattr__`
    from ring_attention import testing as testing
    from ring_attention.attention.blocks import BlockSizes as BlockSizes
    from ring_attention.attention.blockwise import blockwise_attention as blockwise_attention
    from ring_attention.attention.feedforward import blockwise_feedforward as blockwise_feedforward
    from ring_attention.attention.intervals import Intervals as Intervals
    from ring_attention.attention.mask import Mask as Mask
    from ring_attention.attention.reference import reference_attention as reference_attention
    from ring_attention.parallel.context import context_attention as context_attention
    from ring_attention.parallel.context import ring_attention as ring_attention
    from ring_attention.parallel.dealt_rows import DealtRows as DealtRows
    from ring_attention.parallel.decode import decode_attention as decode_attention
    from ring_attention.parallel.decode import decode_attention_shard as decode_attention_shard
    from ring_attention.parallel.flax_attention import flax_attention_fn as flax_attention_fn
    from ring_attention.parallel.layouts import SequenceLayout as SequenceLayout
    from ring_attention.parallel.mesh import compiler_options as compiler_options
    from ring_attention.parallel.mesh import make_mesh as make_mesh
    from ring_attention.parallel.shard import context_attention_shard as context_attention_shard
    from ring_attention.parallel.shard import ring_attention_shard as ring_attention_shard
    from ring_attention.parallel.simulate import simulate_devices as simulate_devices
    from ring_attention.parallel.strategies import STRATEGIES as STRATEGIES
    from ring_attention.parallel.strategy import SAVED_NAMES as SAVED_NAMES
    from ring_attention.parallel.strategy import Strategy as Strategy

__version__ = "0.1.0"

_MODULES = {
    "BlockSizes": "attention.blocks",
    "DealtRows": "parallel.dealt_rows",
    "Intervals": "attention.intervals",
    "Mask": "attention.mask",
    "SAVED_NAMES": "parallel.strategy",
    "STRATEGIES": "parallel.strategies",
    "SequenceLayout": "parallel.layouts",
    "Strategy": "parallel.strategy",
    "blockwise_attention": "attention.blockwise",
    "blockwise_feedforward": "attention.feedforward",
    "compiler_options": "parallel.mesh",
    "context_attention": "parallel.context",
    "context_attention_shard": "parallel.shard",
    "decode_attention": "parallel.decode",
    "decode_attention_shard": "parallel.decode",
    "flax_attention_fn": "parallel.flax_attention",
    "make_mesh": "parallel.mesh",
    "reference_attention": "attention.reference",
    "ring_attention": "parallel.context",
    "ring_attention_shard": "parallel.shard",
    "simulate_devices": "parallel.simulate",
    "testing": "testing",
}
"""Public name -> the module that it is imported from when somebody first asks for it, or that it is."""

__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:  # a type checker would take a module's __getattr__ for a leave to misspell

    def __getattr__(name: str) -> object:
        """Import the public name when it is first used, so that importing the package costs nothing beside JAX."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        value = module if _MODULES[name] == name else getattr(module, name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """Names of the module, those not yet imported too."""
        return sorted({*globals(), *__all__})
