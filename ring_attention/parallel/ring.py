"""Ring attention: key/value blocks travel around a ring of devices while each attends to the block it holds.

Liu, Zaharia & Abbeel 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context".
"""

import dataclasses

from ring_attention.attention.masks import Hop, Tokens
from ring_attention.attention.rule import Rule
from ring_attention.checks import require
from ring_attention.parallel.exchange import attend
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.rotation import Rotation
from ring_attention.parallel.routes import Route, plan_routes, token_hops
from ring_attention.parallel.strategy import Setting, Strategy, Workload


def rotation_of(setting: Setting, rule: Rule, shard_len: int, *, duplex=False, unroll=False, width=1) -> Rotation:
    """A ring over the places of the layout, each of `width` consecutive devices, for shards of so many tokens."""
    return Rotation(
        axis_name=setting.axis_name,
        layout=setting.layout,
        routes=plan_routes(setting.layout, shard_len, causal=rule.causal, reach=rule.window, duplex=duplex),
        unroll=unroll,
        kernel=setting.kernel,
        blocks=setting.blocks,
        width=width,
    )


def check_hops(setting: Setting, rule: Rule, shard_len: int, *, duplex: bool = False) -> None:
    """Raise ValueError unless the kernel can compute every hop of such a ring."""
    routes = plan_routes(setting.layout, shard_len, causal=rule.causal, reach=rule.window, duplex=duplex)
    shard = Tokens(None, runs=setting.layout.runs(shard_len))
    setting.kernel.check_hop(Hop(shard, shard, rule, own=True))
    for start, stop in {(route.start, route.stop) for route in routes if route.hops}:
        part = Tokens(None, runs=setting.layout.runs(shard_len, start, stop))
        setting.kernel.check_hop(Hop(shard, part, rule))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(Strategy):
    """Keys and values go around the ring, queries stay.

    Attributes:
      duplex: send the second half of each shard the other way round, for links that carry both directions at once.
      unroll: write the steps of the ring out instead of looping over them (docs/structure.md compares the programs).
    """

    name = "ring"
    source = "Liu, Zaharia & Abbeel 2023"
    memory = "4 n/P d_kv, the blocks at hand and on their way, and n/P d of statistics in float32"
    communication = "2 n d_kv (P-1)/P, beside the computation; with a window only as far as it reaches"
    claim = ("O(n/P)", "O(n d), pipelined")

    duplex: bool = False
    unroll: bool = False

    def check(self, setting: Setting, q_shape, kv_heads: int, rule: Rule) -> None:
        """The kernel must be able to compute every hop."""
        check_hops(setting, rule, q_shape[1], duplex=self.duplex)

    def attend(self, setting: Setting, q, k, v, segments, rule: Rule, sinks):
        """See `Strategy`."""
        rotation = rotation_of(setting, rule, q.shape[2], duplex=self.duplex, unroll=self.unroll)
        return attend(rotation, q, k, v, segments, rule, sinks)

    def memory_bytes(self, work: Workload) -> int:
        """What travels of K and V, twice where it goes on, and the statistics of the queries in float32."""
        tokens = sum((route.stop - route.start) * min(route.hops, 2) for route in self._routes(work))
        return 2 * work.bytes_of(tokens, work.kv_heads) + work.bytes_of(work.shard, work.heads, 4)

    def sent_bytes(self, work: Workload, backward: bool = False) -> int:
        """K and V along each route; backward the same again, and dK and dV in float32 as often."""
        hops = token_hops(self._routes(work))
        sent = 2 * work.bytes_of(hops, work.kv_heads) + work.segment_bytes(hops)
        return sent + 2 * work.bytes_of(hops, work.kv_heads, 4) * backward

    def _routes(self, work: Workload) -> tuple[Route, ...]:
        layout = SequenceLayout(work.layout, work.devices)
        return plan_routes(layout, work.shard, causal=work.causal, reach=work.window, duplex=self.duplex)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindow(Ring):
    """Each device gets the last tokens of the one before it, as far as the window reaches, and no more."""

    name = "sliding_window"
    source = "Beltagy, Peters & Cohan 2020; neighbour exchange as in ring attention with a window"
    full = False
    memory = "2 min(W, n/P) d_kv, and n/P d of statistics in float32"
    communication = "2 W d_kv, whatever n is; in the zigzag layout, both ways, twice that"
    claim = ("O(W)", "O(n W)")

    def check(self, setting: Setting, q_shape, kv_heads: int, rule: Rule) -> None:
        """Refuse to be what it is not."""
        require(
            rule.window is not None,
            'strategy="sliding_window" got no window; give window=, or choose strategy="ring" for full attention',
        )
        require(
            setting.devices == 1 or setting.layout.kind != "striped",
            'strategy="sliding_window" needs neighbours in the sequence to be neighbours in the ring, but '
            'layout="striped" deals them to all devices; use "contiguous" or "zigzag", or strategy="ring"',
        )
        super().check(setting, q_shape, kv_heads, rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleDevice(Strategy):
    """Blockwise attention on one device that holds everything."""

    name = "single_device"
    source = "Rabe & Staats 2021; Dao et al. 2022"
    memory = "n d of statistics in float32"
    communication = "none"
    claim = ("O(n)", "none")

    def check(self, setting: Setting, q_shape, kv_heads: int, rule: Rule) -> None:
        """Refuse more devices than one."""
        require(
            setting.devices == 1,
            f"strategy={self.name!r} needs the whole sequence on one device, but {setting.axis_name!r} has "
            f"{setting.devices}; make the mesh with {setting.axis_name}=1 or choose another strategy",
        )
        check_hops(setting, rule, q_shape[1])

    def attend(self, setting: Setting, q, k, v, segments, rule: Rule, sinks):
        """A ring of one."""
        return attend(rotation_of(setting, rule, q.shape[2]), q, k, v, segments, rule, sinks)

    def memory_bytes(self, work: Workload) -> int:
        """The statistics of the queries in float32."""
        return work.bytes_of(work.seq_len, work.heads, 4)

    def sent_bytes(self, work: Workload, backward: bool = False) -> int:
        """None."""
        return 0
