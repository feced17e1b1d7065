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

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.blockwise import blockwise_attention
from ring_attention.attention.feedforward import blockwise_feedforward
from ring_attention.attention.reference import reference_attention
from ring_attention.parallel.context import (
    context_attention,
    context_attention_shard,
    ring_attention,
    ring_attention_shard,
)
from ring_attention.parallel.decode import decode_attention, decode_attention_shard
from ring_attention.parallel.exchange import SAVED_NAMES
from ring_attention.parallel.flax_attention import flax_attention_fn
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.strategies import STRATEGIES

__version__ = "0.1.0"

__all__ = [
    "SAVED_NAMES",
    "STRATEGIES",
    "BlockSizes",
    "SequenceLayout",
    "blockwise_attention",
    "blockwise_feedforward",
    "context_attention",
    "context_attention_shard",
    "decode_attention",
    "decode_attention_shard",
    "flax_attention_fn",
    "make_mesh",
    "reference_attention",
    "ring_attention",
    "ring_attention_shard",
]
