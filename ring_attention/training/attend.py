"""The attention that the layers of a model call, as a config says."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_attention.attention.blocks import BlockSizes
from ring_attention.attention.dropout import Dropout
from ring_attention.attention.kernels import find_kernel
from ring_attention.attention.kernels.contract import Kernel
from ring_attention.attention.mask import Chunks
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.layers import Attend, ThisAttention
from ring_attention.parallel.dealt_rows import DealtRows
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.mesh import SEQUENCE
from ring_attention.parallel.shard import context_attention_shard
from ring_attention.parallel.strategy import Context, Strategy
from ring_attention.training.attention_config import AttentionConfig


def alibi_slopes(heads: int) -> np.ndarray:
    """Return the slopes of Press et al. 2022, float32 [H].

    Of 2**n heads they are 2**(-8 i / H) for i = 1 ... H. Other numbers take those of the next lower power of two, then
    every second of the next higher one.
    """
    whole = 2 ** int(math.log2(heads))
    first = 2.0 ** (-8.0 * np.arange(1, whole + 1) / whole)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - whole), 2) / whole)
    return np.concatenate([first, between]).astype(np.float32)


def scores_of(attention: AttentionConfig, model: ModelConfig, this: ThisAttention, heads: int) -> dict[str, Any]:
    """Return what attention takes of how scores are made, for so many heads of a layer."""
    own_scale = model.attention_scale or model.value_dim > model.head_dim  # to which keys are padded
    slopes = None
    if attention.alibi:
        slopes = lax.dynamic_slice_in_dim(jnp.asarray(alibi_slopes(model.num_heads)), this.first_head, heads)
    return dict(
        scale=model.score_scale if own_scale else None,
        softcap=this.kind.softcap or None,
        sinks=this.sinks,
        alibi_slopes=slopes,
    )


def strategies_of(attention: AttentionConfig, model: ModelConfig) -> list[Strategy]:
    """Return the strategies that the layers of a completed model use."""
    local = {run.kind.is_local for run in model.loop.runs}
    return [attention.make_local_strategy() if each else attention.make_strategy() for each in sorted(local)]


def check_kinds(
    attention: AttentionConfig,
    model: ModelConfig,
    layout: SequenceLayout,
    shard_len: int,
    head_parts: int,
    *,
    kernel: Kernel | None = None,
) -> None:
    """Raise ValueError unless strategies, and a kernel under them, can do what each kind of layer asks on a device.

    Nothing is traced: that what passes here can be traced is held by a test.

    Args:
      attention: says which.
      model: of `AttentionConfig.completed`.
      layout: of the sequence.
      shard_len: tokens of a device.
      head_parts: parts that the heads of a layer are computed in, by devices and by groups.
      kernel: takes the place of `attention.impl`.
    """
    kernel = kernel or find_kernel(attention.impl)
    for kind in {run.kind: None for run in model.loop.runs}:
        chosen = attention.make_local_strategy() if kind.is_local else attention.make_strategy()
        check_kind(attention, model, kind, layout, shard_len, head_parts, strategy=chosen, kernel=kernel)


def check_kind(
    attention: AttentionConfig,
    model: ModelConfig,
    kind: LayerKind,
    layout: SequenceLayout,
    shard_len: int,
    head_parts: int,
    *,
    strategy: Strategy,
    kernel: Kernel,
) -> None:
    """Raise ValueError unless strategy and kernel can do what layers of a kind ask; the others as in `check_kinds`."""
    heads, kv_heads = model.num_heads // head_parts, model.num_kv_heads // head_parts
    width = max(model.head_dim, model.value_dim)
    context = Context(axis_name=SEQUENCE, layout=layout, kernel=kernel, blocks=BlockSizes())
    mask = mask_spec_of(attention, kind, heads)
    kernel.check(mask, jax.ShapeDtypeStruct((1, heads, shard_len, width), model.compute_dtype))
    strategy.check(context, (1, shard_len, heads, width), kv_heads, mask)


def reach_of(attention: AttentionConfig, kind: LayerKind) -> int | None:
    """How many tokens a token of such layers may see in training, itself among them; None for no bound."""
    bounds = [bound for bound in (kind.reach, attention.max_segment_len) if bound]
    return min(bounds) if bounds else None


def mask_spec_of(attention: AttentionConfig, kind: LayerKind, heads: int) -> MaskSpec:
    """Return the mask of layers of this kind in training, with slopes and seeds of no meaning."""
    drop = None
    if attention.dropout_rate:
        drop = Dropout(rate=attention.dropout_rate, seeds=np.zeros(2), batch=np.zeros(1), heads=np.zeros(heads))
    return MaskSpec(
        scale=1.0,
        window=reach_of(attention, kind),
        extra=mask_of(kind)["extra_mask"],
        softcap=kind.softcap or None,
        slopes=np.zeros(heads) if attention.alibi else None,
        dropout=drop,
    )


def mask_of(kind: LayerKind) -> dict[str, Any]:
    """Return what attention takes of which keys a query sees in layers of this kind."""
    return dict(window=kind.reach, extra_mask=Chunks(kind.chunk) if kind.chunk else None)


def attention_of(
    attention: AttentionConfig,
    model: ModelConfig,
    ring_size: int,
    *,
    table: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    first_sequence: int | jax.Array = 0,
) -> Attend:
    """Return the attention that a model's layers call on the slices of one of `ring_size` devices.

    Args:
      attention: says how.
      model: of `AttentionConfig.completed`.
      ring_size: devices that share a sequence.
      table: this device's part int32 [B,1,n] of the table of `DealtRows`; None: tokens lie as `make_layout` says.
      dropout_key: of a step of training; None: nothing is dropped.
      first_sequence: int32, the number of this device's first sequence in the batch, by which dropout counts.
    """
    strategies = {False: attention.make_strategy(), True: attention.make_local_strategy()}
    layout = attention.make_layout(ring_size)
    if table is not None:
        layout = SequenceLayout("given", ring_size, given_chunks=table.shape[2])

    def attend(q, k, v, this: ThisAttention, *, segment_ids):
        dropout = {}
        if dropout_key is not None and attention.dropout_rate:
            key = jax.random.fold_in(dropout_key, this.number)
            dropout = dict(dropout_rate=attention.dropout_rate, dropout_key=key, batch_offset=first_sequence)
        return context_attention_shard(
            q,
            k,
            v,
            strategy=strategies[this.kind.is_local],
            axis_name=SEQUENCE,
            layout=layout,
            positions=None if table is None else DealtRows(table).shard_positions(0, q.shape[1]),
            count_hops=table is not None,
            segment_ids=segment_ids,
            max_segment_len=attention.max_segment_len or None,
            head_offset=this.first_head,
            impl=attention.impl,
            block_sizes=attention.block_sizes,
            **mask_of(this.kind),
            **scores_of(attention, model, this, q.shape[2]),
            **dropout,
        )

    return attend
