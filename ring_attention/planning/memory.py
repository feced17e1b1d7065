"""Bytes of one device that a training step needs, part by part, without compiling it.

The parts follow from the shapes of what `training.step` and `models.transformer` keep. What the compilers add to that
(copies in another layout, prefetched weights, gaps between buffers) was read off compiled programs: docs/planner.md
shows prediction and compiler side by side.
"""

import dataclasses
import operator

from ring_attention.models.layer_kinds import LayerKind
from ring_attention.parallel.mesh import SEQUENCE, TENSOR
from ring_attention.parallel.strategy import Strategy
from ring_attention.planning.shares import Share

F32 = 4

UPDATE = 3.5
"""Float32 arrays as large as a layer's parameters that a layer's update needs at once, where the host keeps them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffers:
    """The arrays that a compiler holds at once, read off compiled programs (docs/planner.md).

    Attributes:
      feedforward: (streams, queries, keys) at the peak of a feed-forward's backward pass: arrays as large as this
        device's residual stream, its queries, and its keys, all in the compute dtype.
      attention: the same of attention's backward pass; the larger counts.
      split: of the arrays as large as the residual stream those whose width tp shares out.
      offloaded: in place of the last number of `attention`, where the host keeps what the backward pass needs: beside
        large arrays on the device a TPU's compiler packs the small ones less closely.
      groups: arrays as large as all queries that are held where heads are computed in groups: out and its cotangent,
        and copies of them.
      gaps: part of what is kept for the backward pass that is lost between buffers.
    """

    feedforward: tuple[int, int, int]
    attention: tuple[int, int, int]
    split: int
    offloaded: int
    groups: int
    gaps: float


BUFFERS = {
    "tpu": Buffers(feedforward=(15, 8, 0), attention=(10, 4, 34), split=9, offloaded=12, groups=0, gaps=0.09),
    "gpu": Buffers(feedforward=(4, 8, 0), attention=(4, 7, 4), split=0, offloaded=5, groups=5, gaps=0.0),
}
"""Platform -> Buffers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory that a step needs of one device, in bytes.

    Attributes:
      parts: name -> bytes, in the order in which they are stacked: parameters; optimizer (AdamW's two moments);
        gradients; activations kept from the forward pass for the backward pass; the layer at work (its gathered
        weights, their gradients, and its activations); keys and values in flight, with what the strategy holds beside
        them; vocabulary (embedding and unembedding gathered); loss (the logits of a chunk).
      host: bytes of the host's memory, for what is kept there: activations, and the state that is offloaded.
    """

    parts: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def memory_of(share: Share, strategy: Strategy) -> Memory:
    """Predict the memory that a step needs of one device of the pod; `strategy` is that of the main kind of layer."""
    own, layers, offload = F32 * share.own_parameters, F32 * share.own_layers, share.config.optimizer.offload
    moments, others = layers * (offload != "none"), layers * (offload == "parameters")
    kept, host = kept_for_backward(share)
    kept *= 1 + BUFFERS[share.topology.chip.platform].gaps
    parts = {
        "parameters": own - others,
        "optimizer": 2 * (own - moments),
        "gradients": own - others,
        "activations": kept,
        "layer": _layer(share),
        "keys and values": _exchange(share, strategy),
        "vocabulary": _vocabulary(share),
    }
    of_layer = parts["layer"] + parts["keys and values"]
    if others and share.topology.chip.platform == "gpu":  # there nothing of the vocabulary stands beside a layer
        of_embedding = parts["gradients"] * (1 - 1 / share.model.vocab_tables)  # whose gradient comes last
        parts["gradients"] -= of_embedding
        parts["vocabulary"] = max(parts["vocabulary"] + of_embedding - of_layer, 0)
        of_layer += parts["vocabulary"]
    parts["loss"] = _loss(share, of_layer)
    if moments:
        update = UPDATE * layers / share.model.num_layers
        parts["layer"] += max(update - of_layer - parts["loss"] - kept, 0)
    return Memory(parts={name: int(size) for name, size in parts.items()}, host=int(host + host_state(share)))


def host_state(share: Share) -> int:
    """Bytes of parameters, moments and gradients that the host keeps for a device; see `OptimizerConfig.offload`."""
    optimizer, layers = share.config.optimizer, F32 * share.own_layers
    copies = {"none": 0, "moments": 2, "parameters": 4 + (optimizer.accumulation_steps > 1)}  # a second of gradients
    return copies[optimizer.offload] * layers


def _stream(share: Share) -> int:
    """Bytes of the residual stream of this device's tokens."""
    return share.batch * share.tokens * share.model.model_dim * share.itemsize


def _heads(share: Share, heads: int) -> int:
    """Bytes of an array of so many heads of this device's tokens."""
    return share.batch * share.tokens * heads * share.head_width * share.itemsize


def on_host(share: Share) -> bool:
    """Whether the host keeps what the backward pass needs."""
    return share.model.remat.startswith("offload")


def kept_for_backward(share: Share) -> tuple[int, int]:
    """Bytes that all layers keep for the backward pass, (on the device, on the host); see `ModelConfig.remat`."""
    layers, of_heads = share.model.num_layers, _heads(share, share.heads)
    statistics = layers * F32 * share.batch * share.tokens * share.heads
    rounded = sum(group.layers for group in share.groups if share.keeps_rounding(group.kind))
    statistics += rounded * (of_heads // 4)  # half a byte of a number of two bytes
    inputs, out = layers * _stream(share), layers * of_heads + statistics
    if share.model.remat == "full":
        return inputs, 0
    if share.model.remat == "attention":
        return inputs + out, 0
    if share.model.remat == "offload":  # lse stays, and what rounding took
        return statistics, inputs + out - statistics
    if share.model.remat == "offload_input":
        return 0, inputs
    norms = (
        {"both": 4, "parallel": 1}.get(share.model.norm_place, 2) * 5 * _stream(share)
    )  # each in float32, scaled in float32, and in the compute dtype
    qkv, between = _heads(share, share.heads + 2 * share.kv_heads), 2 * _stream(share)
    weights = (share.attention_weights + share.ffn_weights) * share.itemsize  # as they were gathered
    hidden = 2 * share.batch * share.tokens * share.model.ffn_dim // share.mesh[TENSOR] * share.itemsize  # gate and up
    return inputs + out + layers * (norms + qkv + between + hidden + weights), 0


def host_traffic(share: Share) -> tuple[int, int]:
    """Bytes between a device and its host for what `optimizer.offload` keeps there: (in a micro-batch, in an update).

    A layer's weights come for its forward and its backward pass, and its gradients go. Moments come and go for the
    update; so do parameters, and their gradients come twice, for the norm first.
    """
    layers, offload = F32 * share.own_layers, share.config.optimizer.offload
    adding = 3 * (share.config.optimizer.accumulation_steps > 1)  # both gradients come, their sum goes
    return {"none": (0, 0), "moments": (0, 4 * layers), "parameters": ((3 + adding) * layers, 8 * layers)}[offload]


def _layer(share: Share) -> int:
    """Bytes of a layer's backward pass: its weights, the feed-forward's a second time in another layout, their
    gradients for the sum over devices in float32, and the arrays of its tokens.
    """
    weights = share.attention_weights + share.ffn_weights
    of_weights = (weights + 2 * share.ffn_weights) * share.itemsize + F32 * weights
    if share.owners == 1:  # nobody sums them, and no array of the ring is in flight
        of_weights = weights * share.itemsize
    groups = share.model.head_groups
    arrays = _stream(share), _heads(share, share.heads) // groups, _heads(share, share.kv_heads) // groups
    buffers = BUFFERS[share.topology.chip.platform]
    attention = (*buffers.attention[:2], buffers.offloaded) if on_host(share) else buffers.attention
    peaks = (sum(map(operator.mul, counts, arrays)) for counts in (buffers.feedforward, attention))
    of_all_groups = (buffers.groups - (share.owners == 1)) * _heads(share, share.heads) if groups > 1 else 0
    less = buffers.split * (_stream(share) - _stream(share) // share.mesh[TENSOR])
    return of_weights + max(peaks) - less + of_all_groups


def _exchange(share: Share, strategy: Strategy) -> int:
    """Bytes of keys and values at hand and on their way, and of their gradients in float32.

    One layer is at work at a time; the kind that holds most decides. In a ring over slices of TPUs every device has
    room for what arrives by a link and for what comes from another slice, and takes one of the two.
    """
    if share.ring == 1:
        return 0
    groups = share.model.head_groups  # of which one is computed at a time, in an attention of its own

    def arriving_in(kind: LayerKind) -> int:
        work = share.work(kind, heads=share.heads // groups, kv_heads=share.kv_heads // groups)
        statistics = work.bytes_of(work.shard, work.heads, F32)
        held = share.strategy_of(kind, strategy).memory_bytes(work) - statistics
        return max(held, 2 * work.bytes_of(work.shard, work.kv_heads))

    arriving = max(arriving_in(group.kind) for group in share.groups)
    ways = 2 if share.slice_mesh[SEQUENCE] < share.ring else 1
    return ways * (arriving + arriving * F32 // share.itemsize)


def _vocabulary(share: Share) -> int:
    return 2 * share.vocab_weights * share.itemsize


def _loss(share: Share, later: int) -> int:
    """Bytes of a chunk's logits and gradients, as far as they are more than a layer's backward pass needs later."""
    tokens = min(share.model.loss_chunk, share.tokens) * share.batch
    vocab = share.model.vocab_size // share.mesh[TENSOR]
    logits = 1.5 * F32 * tokens * vocab
    gradients = share.vocab_weights * (share.itemsize + F32)
    return max(logits + gradients - later, 0)
