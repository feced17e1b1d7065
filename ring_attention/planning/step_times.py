"""How long a training step takes by each strategy, and what it sends on which wires."""

import dataclasses

from ring_attention.checks import ConfigError
from ring_attention.hardware.rates import Wires, wires_of
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.parallel.mesh import DATA, FSDP, SEQUENCE, TENSOR
from ring_attention.parallel.ring import SingleDevice
from ring_attention.parallel.strategies import scheduled
from ring_attention.parallel.strategy import Strategy
from ring_attention.parallel.wires import blocks_of_a_link
from ring_attention.parallel.workload import Schedule, Workload
from ring_attention.planning.attention_times import Pace, Seconds, Times, add_up, price_steps
from ring_attention.planning.memory import host_traffic, kept_for_backward
from ring_attention.planning.shares import LayerGroup, Share

RERUN = ("full", "offload_input")
"""Policies under which the backward pass of a layer runs its attention once more."""

LAYER_PASSES, LOGIT_PASSES = 4.3, 8.8
"""Passes over memory that norms, rotary positions, SwiGLU and sums make: over a layer's arrays (its stream, queries,
keys, values and hidden) forward and, twice, backward; and over the logits in float32. Fitted to eight training steps on
an H100, which they bring to 0.94 to 1.05 of what was measured (docs/planner.md).
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindTime:
    """What the attention of the layers of one kind takes in a training step.

    Attributes:
      name: of the kind, in words.
      layers: how many there are.
      strategy: of their attention, by name.
      compute: seconds of computing, of all these layers, both passes.
      waits: seconds of waiting for the strategy's transfers.
      sent: bytes that a device sends of keys, values and their gradients.
      forward, backward: of one layer of one micro-batch.
    """

    name: str
    layers: int
    strategy: str
    compute: float
    waits: float
    sent: int
    forward: Times
    backward: Times


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Predicted seconds of one training step, part by part; the sum is the step.

    Attributes:
      dense: matrix products of layers and unembedding, with those that rematerialisation repeats.
      attention: computing attention, all layers, both passes.
      attention_waits: waiting for the strategy's transfers.
      weights_wait: waiting for weights and their gradients, as far as attention does not hide them.
      sums_wait: waiting for the sums of tensor parallelism, and of data parallelism where they follow several
        micro-batches; those of one are summed layer by layer, with the gradients of weights.
      host_wait: waiting for activations and weights that the host keeps, as far as computing does not hide them, and
        for the state that it keeps, which the update reads and writes.
      memory_bound: what waits for the device's memory: norms, activation functions, the logits' softmax, and the
        optimizer's update, which reads and writes all that it keeps.
      kinds: attention by kind of layer, of which `attention` and `attention_waits` are the sums.
    """

    dense: float
    attention: float
    attention_waits: float
    weights_wait: float
    sums_wait: float
    host_wait: float
    memory_bound: float
    kinds: tuple[KindTime, ...]

    @property
    def total(self) -> float:
        """Seconds of the whole step: every field that is seconds, so that none can be left out."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self) if field.type is float)


def pace_of(share: Share, kind: LayerKind | None = None) -> Pace:
    """Work out how fast one device of the pod computes attention, by default of the main kind of layer."""
    topology, attention = share.topology, share.attention_of(kind or share.main_kind)
    rate = topology.kernel_rate(attention.kernel.name, share.head_width)
    return Pace(
        forward=topology.chip.flops * rate.forward,
        backward=topology.chip.flops * rate.backward,
        memory=topology.reached.memory_bandwidth,
        tile=min(attention.blocks.q, attention.blocks.kv),
        call=rate.call,
        call_backward=rate.call_backward,
    )


def schedule_of(share: Share, strategy: Strategy, backward: bool = False, kind: LayerKind | None = None) -> Schedule:
    """Ask the strategy for the schedule of one layer's attention, of one micro-batch; by default of the main kind.

    Raises:
      ConfigError: for a strategy whose schedule is not known.
    """
    work = share.work(kind)
    schedule = (strategy if work.devices > 1 else SingleDevice()).schedule(work, backward)  # one device computes alone
    if schedule is None:
        field = "local_strategy" if kind and kind.is_local else "strategy"
        raise ConfigError(
            f"attention.{field}={strategy.name!r}: the planner does not know how long it takes on {share.ring} "
            f"devices; plan with one of {', '.join(scheduled(work))}"
        )
    return schedule


def priced_steps(share: Share, strategy: Strategy, backward: bool, kind: LayerKind | None = None) -> list[Seconds]:
    """Price the steps of `schedule_of`, in seconds."""
    schedule = schedule_of(share, strategy, backward, kind)
    return price_steps(schedule, pace_of(share, kind), ring_wires(share, schedule.width))


def attention_times(share: Share, strategy: Strategy, backward: bool, kind: LayerKind | None = None) -> Times:
    """Predict one layer's attention, of one micro-batch; raises ConfigError as `schedule_of` does."""
    return add_up(priced_steps(share, strategy, backward, kind))


def ring_wires(share: Share, width: int = 1) -> Wires:
    """Find the wires of a ring along which `width` neighbours share each place and swap heads for tokens.

    Each of them goes around with heads of its own. Across hosts each has its own adapter. On a TPU the way to the next
    place is `width` devices on along the cycle, by links that others use too.
    """
    tp, topology = share.mesh[TENSOR], share.topology
    wires = wires_of(topology, share.ring, tp)
    hop = wires.hop
    if wires.kind == "ICI" and 1 < width < share.ring:
        sides = topology.box(share.ring)
        hop /= blocks_of_a_link(sides, tuple(map(topology.wraps, sides)), width)
    return dataclasses.replace(wires, hop=hop, swap=wires_of(topology, width, tp).swap)


def kind_time(
    share: Share, group: LayerGroup, strategy: Strategy, forward: Times, backward: Times, sent: int
) -> KindTime:
    """Add up what the layers of one kind take, of which each takes so long and which send so many bytes a step."""
    passes = 1 + (share.model.remat in RERUN)  # whole layers run once more, attention too
    each, repeats = group.layers, share.config.optimizer.accumulation_steps
    return KindTime(
        name=group.name,
        layers=each,
        strategy=strategy.name,
        compute=repeats * (each * (passes * forward.compute + backward.compute)),
        waits=repeats * (each * (passes * forward.exposed + backward.exposed)),
        sent=sent,
        forward=forward,
        backward=backward,
    )


def _planned_kind(share: Share, group: LayerGroup, strategy: Strategy) -> KindTime:
    """Predict the attention of the layers of one kind."""
    passes = (attention_times(share, strategy, back, group.kind) for back in (False, True))
    return kind_time(share, group, strategy, *passes, attention_bytes(share, group, strategy))


def step_time(share: Share, strategy: Strategy, kinds: tuple[KindTime, ...] = ()) -> StepTime:
    """Predict the whole step, where `strategy` takes the place of `attention.strategy`.

    `kinds` are the times of the first of `share.groups` where they are known otherwise, as of packed documents.
    """
    config, model, chip = share.config, share.model, share.topology.reached
    layers, repeats = model.num_layers, config.optimizer.accumulation_steps
    planned = share.groups[len(kinds) :]
    kinds += tuple(_planned_kind(share, group, share.strategy_of(group.kind, strategy)) for group in planned)
    tokens = share.batch * share.tokens
    rerun = 0 if model.remat == "none" else 2
    products = tokens * layers * (share.attention_weights + share.ffn_weights) * (6 + rerun)
    products += tokens * share.vocab_weights * 6
    dense = products / chip.flops
    attention = sum(kind.compute for kind in kinds) / repeats
    gradients, in_layers = data_seconds(share), repeats == 1  # those of one micro-batch are summed layer by layer
    weights = weights_seconds(share) + gradients * in_layers
    crossing, of_update = host_traffic(share)
    crossing += 2 * kept_for_backward(share)[1]
    return StepTime(
        dense=repeats * dense,
        attention=repeats * attention,
        attention_waits=sum(kind.waits for kind in kinds),
        weights_wait=repeats * max(weights - attention, 0.0),
        sums_wait=repeats * tensor_seconds(share) + (0.0 if in_layers else gradients),
        host_wait=repeats * max(crossing / chip.host_link - dense - attention, 0.0) + of_update / chip.host_link,
        memory_bound=repeats * passes_seconds(share) + 7 * 4 * share.own_parameters / chip.memory_bandwidth,
        kinds=kinds,
    )


def passes_seconds(share: Share) -> float:
    """Predict the seconds in which a micro-batch's arrays pass through memory, outside of matrix products."""
    model, tokens = share.model, share.batch * share.tokens
    tp = share.mesh[TENSOR]
    heads = share.head_width * (share.heads + 2 * share.kv_heads)
    arrays = tokens * (model.model_dim + heads + model.ffn_dim // tp) * share.itemsize
    layers = LAYER_PASSES * (3 + (model.remat != "none")) * model.num_layers * arrays
    logits = LOGIT_PASSES * 4 * tokens * model.vocab_size // tp
    return (layers + logits) / share.topology.reached.memory_bandwidth


def weights_bytes(share: Share) -> int:
    """Count the bytes that arrive: weights in the compute dtype before each pass, gradients in float32 after it."""
    layers = share.model.num_layers * (share.attention_weights + share.ffn_weights)
    gathers = layers * (1 if share.model.remat == "none" else 2) + 2 * share.vocab_weights
    sums = layers + 2 * share.vocab_weights
    return (gathers * share.itemsize + 4 * sums) // share.model.model_dim * share.width * (share.owners - 1)


def weights_seconds(share: Share) -> float:
    """Predict the seconds of gathering weights and of summing their gradients, if nothing else is sent."""
    wires = wires_of(share.topology, share.owners, share.mesh[TENSOR])
    return weights_bytes(share) / wires.gather


def sums_bytes(share: Share) -> dict[str, int]:
    """Count the bytes that a device sends in its sums, by mesh axis: activations over tp, gradients over dp."""
    tp, dp = share.mesh[TENSOR], share.mesh[DATA]
    activations = share.batch * share.tokens * share.model.model_dim * share.itemsize
    passes = 4 + 2 * (share.model.remat != "none")
    return {
        TENSOR: 2 * activations * share.model.num_layers * passes * (tp - 1) // tp,
        DATA: 2 * 4 * share.own_parameters * (dp - 1) // dp,
    }


def tensor_seconds(share: Share) -> float:
    """Predict the seconds of a micro-batch's sums over tp; nothing hides them."""
    sent, wires = sums_bytes(share)[TENSOR], wires_of(share.topology, share.mesh[TENSOR])
    return sent / wires.gather if sent else 0.0


def data_seconds(share: Share) -> float:
    """Predict the seconds of the sums of gradients over dp, if nothing else is sent."""
    sent, beside = sums_bytes(share)[DATA], share.devices // share.mesh[DATA]
    return sent / wires_of(share.topology, share.mesh[DATA], beside).gather if sent else 0.0


def attention_bytes(share: Share, group: LayerGroup, strategy: Strategy, work: Workload | None = None) -> int:
    """Count the bytes of keys, values and their gradients that one device sends in a step, of one kind of layer.

    `work` is that of one layer where it is not the plan's own, as of packed documents.
    """
    work, passes = work or share.work(group.kind), group.layers * share.config.optimizer.accumulation_steps
    forward = strategy.sent_bytes(work) * (1 + (share.model.remat in RERUN))
    return passes * (forward + strategy.sent_bytes(work, backward=True))


def sent_bytes(share: Share) -> dict[str, int]:
    """Count the bytes that one device sends in a step, by purpose."""
    repeats, sums = share.config.optimizer.accumulation_steps, sums_bytes(share)
    attention = sum(attention_bytes(share, group, share.strategy_of(group.kind)) for group in share.groups)
    return {
        f"attention ({SEQUENCE})": attention,
        f"weights and their gradients ({FSDP}, {SEQUENCE})": weights_bytes(share) * repeats,
        f"activations ({TENSOR})": sums[TENSOR] * repeats,
        f"gradients ({DATA})": sums[DATA],
    }
