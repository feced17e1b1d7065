"""The attention of a config's layers, called by itself."""

from ring_attention.models.layers import ThisAttention
from ring_attention.training.attend import attention_of


def attention_alone(attention, model, ring_size, kind=None):
    """`fn(q, k, v, segment_ids=None)` of a layer, by default the first, on a device's slices, for all heads."""
    model = attention.completed(model)
    attend = attention_of(attention, model, ring_size)
    this = ThisAttention(kind or model.kinds[0], 0, 0, None)
    return lambda q, k, v, segment_ids=None: attend(q, k, v, this, segment_ids=segment_ids)
