"""Finds what should not be in a compiled training step: whole sequences on one device, and masks kept in memory."""

from ring_attention.parallel.mesh import SEQUENCE, TENSOR
from ring_attention.parallel.workload import BOTH_WAYS, HOP
from ring_attention.planning.hlo.axes import axes_of
from ring_attention.planning.hlo.compiled import collectives_in
from ring_attention.planning.hlo.program import ENTRY, Array, Program
from ring_attention.planning.shares import Share

_OF_MASKS = ("pred", "s32", "f32")
_MAKES_NOTHING = ("get-tuple-element", "tuple", "while", "conditional", "parameter")


def whole_sequences(program: Program, share: Share) -> list[str]:
    """Find activations of the whole sequence that a collective along the ring gives one device, a line each.

    These are results of an all-gather, and where the strategy only sends to the next place of a ring, of an all-reduce
    or all-to-all too, in floating point, with a dimension of T, or with as many elements as the keys of all tokens
    have. Weights are sharded over the ring as well and gathered too: what has the sides of a weight of the config is
    taken for one, so an activation that has the same sides is overlooked.
    """
    schedules = [share.strategy_of(group.kind).schedule(share.work(group.kind)) for group in share.groups]
    hops_only = all(schedule is not None and schedule.ways <= {HOP, BOTH_WAYS} for schedule in schedules)
    kinds = ["all-gather"] + ["all-reduce", "all-to-all"] * hops_only
    tokens, lines = share.config.seq_len, []
    keys = share.batch * tokens * share.kv_heads * share.head_width
    for item in collectives_in(program):
        if item.kind not in kinds or SEQUENCE not in axes_of(item, share.slice_mesh).split("+"):
            continue
        for array in item.arrays:
            whole = (tokens in array.shape or array.size >= keys) and "f" in array.dtype
            if whole and _sides(array) not in _weights(share):
                lines.append(
                    f"{item.kind} {item.name} gives each device {_in_words(array)}, all {tokens} tokens; "
                    f"keep the activation sharded over {SEQUENCE!r}, and let the ring bring its blocks"
                )
    return lines


def kept_masks(program: Program, share: Share) -> list[str]:
    """Find masks, or biases, that lie in memory between instructions, each array once, a line each.

    These are arrays of pred, s32 or f32 that have two sides of t or T; or that have a side of P, P-1 or P-2, as what
    is kept for each hop does, and two more of t, T or a tile. A size that is also one of the model's widths or numbers
    of heads tells nothing and is not looked for; nor are two sides of t where a tile is as large as a shard.
    """
    blocks = share.attention.blocks
    known, tiles = _model_sizes(share), {blocks.q, blocks.kv}
    tokens = {share.tokens, share.config.seq_len} - known
    hops = {share.ring, share.ring - 1, share.ring - 2} - known - {0, 1}
    found: dict[Array, str] = {}
    for name in program.scheduled:
        for instruction in program.computations[name].values():
            argument = instruction.opcode == "parameter" and name == ENTRY
            if argument or instruction.opcode not in _MAKES_NOTHING:
                for array in instruction.arrays:
                    found.setdefault(array, instruction.name)
    lines = []
    for array, name in found.items():
        of_tokens = sum(side in tokens for side in array.shape)
        of_tiles = sum(side in tokens | tiles - known for side in array.shape)
        one_tile = max(tiles) >= share.tokens and share.config.seq_len not in array.shape
        per_hop = of_tiles >= 2 and any(side in hops for side in array.shape)
        if array.dtype in _OF_MASKS and ((of_tokens >= 2 and not one_tile) or per_hop):
            what = "a mask for each hop" if per_hop else "a mask of whole shards"
            lines.append(
                f"{name} keeps {_in_words(array)}, {what}, in memory; compute it from positions where a tile needs it, "
                "and put an optimization_barrier around them if the compiler lifts it out of the loop"
            )
    return sorted(lines)


def _in_words(array: Array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}] ({array.bytes / 2**20:.3g} MiB)"


def _sides(array: Array) -> tuple[int, ...]:
    return tuple(sorted(side for side in array.shape if side > 1))


def _weights(share: Share) -> set[tuple[int, ...]]:
    """List the sides of the model's gathered weights, those of one layer and of all layers stacked."""
    model, tp = share.model, share.mesh[TENSOR]
    M, widths = model.model_dim, {model.head_dim, model.value_dim}
    of_heads = [(M, heads, width) for heads in (share.heads, share.kv_heads) for width in widths]
    of_layers = [*of_heads, (M, model.ffn_dim // tp), (M,)]
    stacked = [(*layers, *sides) for layers in _stacks(share) for sides in of_layers]
    shapes = [*of_layers, *stacked, (M, model.vocab_size // tp)]
    return {_sides(Array("f32", shape)) for shape in shapes}


def _model_sizes(share: Share) -> set[int]:
    model, tp = share.model, share.mesh[TENSOR]
    widths = {model.model_dim, model.ffn_dim // tp, model.vocab_size // tp, model.head_dim, model.head_dim // 2}
    heads, kv_heads = share.heads, share.kv_heads
    widths |= {model.value_dim, *(number for layers in _stacks(share) for number in layers)}
    return widths | {share.batch, heads, kv_heads, heads // kv_heads}


def _stacks(share: Share) -> set[tuple[int, ...]]:
    """The leading sides that stacks of layers have: all of a run, or those of one period, and of each period."""
    runs = share.config.transformer.loop.runs
    return {sides for run in runs for sides in ((run.count,), (run.periods, run.length), (run.length,))}
