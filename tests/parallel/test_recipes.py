"""CONTRIBUTING.md's recipes, followed from outside: a toy strategy and a toy mask, each in a file of its own."""

import dataclasses
import pathlib
import re
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ring_helpers import ring_mesh

import ring_attention as ra
from ring_attention.attention.mask import Mask
from ring_attention.attention.masks import BlockPair
from ring_attention.attention.online_softmax import SoftmaxState
from ring_attention.attention.varying import axes_of, vary_over
from ring_attention.hardware.rates import Wires
from ring_attention.parallel import strategies
from ring_attention.parallel.strategy import Strategy
from ring_attention.parallel.workload import GATHER, Schedule, Step, Workload
from ring_attention.planning.attention_times import Pace, add_up, price_steps
from ring_attention.testing import oracle, out_and_gradients, random_qkv, random_segments, relative_error

B, T, H, K, D = 2, 24, 4, 2, 8
ROUNDING = 1e-5
ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broadcast(Strategy):
    """A toy: every device gets all keys and values at once."""

    name = "broadcast"
    source = "this test"
    memory = "2 n d_kv"
    communication = "2 n d_kv (P-1)/P"

    def _pair(self, context, me, q, tokens):
        t, layout = q.shape[2], context.layout
        keys = jax.tree.map(lambda x: lax.all_gather(x, context.axis_name, axis=1, tiled=True), tokens.keys)
        keys = dataclasses.replace(keys, positions=layout.all_positions(t).reshape(1, -1), runs=layout.all_runs(t))
        return BlockPair(context.placed(tokens.queries, me, t), keys, tokens.mask)

    def _keys(self, context, *arrays):
        return [lax.all_gather(x, context.axis_name, axis=2, tiled=True) for x in arrays]

    def forward(self, context, me, q, k, v, tokens):
        state = vary_over(SoftmaxState.empty(q.shape), axes_of(q))
        pair = self._pair(context, me, q, tokens)
        return context.kernel.forward(q, *self._keys(context, k, v), pair, state, context.blocks)

    def backward(self, context, me, q, k, v, tokens, stats):
        zero = vary_over(jnp.zeros(q.shape, jnp.float32), axes_of(q))
        pair = self._pair(context, me, q, tokens)
        dq, *dkv = context.kernel.backward(q, *self._keys(context, k, v), stats, pair, zero, context.blocks)
        return dq, *(lax.psum_scatter(x, context.axis_name, scatter_dimension=2, tiled=True) for x in dkv)

    def memory_bytes(self, work):
        return 2 * work.bytes_of(work.seq_len, work.kv_heads)

    def sent_bytes(self, work, backward=False):
        return 2 * work.bytes_of((work.devices - 1) * work.shard, work.kv_heads)

    def schedule(self, work, backward=False):
        sent = self.sent_bytes(work, backward)
        return Schedule(work=work, steps=(Step(keys=sent, way=GATHER), Step(range(work.devices))), backward=backward)


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """A toy: a token sees those that are a multiple of `step` away.

    With step=2: 1 0 0 0
                 0 1 0 0
                 1 0 1 0
                 0 1 0 1
    """

    step: int

    def visible(self, q_positions, k_positions):
        return (q_positions - k_positions) % self.step == 0


@pytest.fixture
def inputs():
    return random_qkv(0, B, T, H, K, D)


def _errors(attend, inputs, **mask):
    found = out_and_gradients(attend, *inputs)
    return [relative_error(got, want) for got, want in zip(found, oracle(*inputs, **mask), strict=True)]


def test_toy_strategy_is_found_by_name_and_matches_oracle(inputs, monkeypatch):
    registry = MappingProxyType({**ra.STRATEGIES, "broadcast": Broadcast()})
    monkeypatch.setattr(strategies, "STRATEGIES", registry)
    mesh, ids = ring_mesh(4), random_segments(1, B, T)
    mask = dict(window=9, segment_ids=ids)

    def attend(q, k, v):
        return ra.context_attention(q, k, v, mesh=mesh, strategy="broadcast", **mask)

    assert max(_errors(attend, inputs, **mask)) < ROUNDING
    assert min(_errors(attend, inputs, window=8, segment_ids=ids)) > 100 * ROUNDING  # the control


def test_toy_strategy_is_priced_by_planning():
    work = Workload(seq_len=T, devices=4, heads=H, kv_heads=K, head_dim=D)
    sent = Broadcast().sent_bytes(work)
    assert sent == 2 * 3 * (T // 4) * K * D * 2
    wires = Wires(hop=1.0, hop_both=1.0, gather=2.0, swap=1.0, kind="pretended")
    times = add_up(price_steps(Broadcast().schedule(work), Pace(forward=1e6, backward=1e6, memory=1e9), wires))
    assert times.wire == times.exposed == sent / 2  # nothing is computed while it sends
    assert times.compute > 0


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_toy_mask_on_shards_matches_oracle(inputs, strategy):
    mesh, layout = ring_mesh(2), ra.SequenceLayout("zigzag", 2)

    def attend(q, k, v):
        q, k, v = (layout.permute(x, 1) for x in (q, k, v))
        out = ra.context_attention(
            q, k, v, mesh=mesh, strategy=strategy, layout=layout, extra_mask=Dilated(3), window=10
        )
        return layout.unpermute(out, 1)

    assert max(_errors(attend, inputs, extra_mask=Dilated(3), window=10)) < ROUNDING
    assert min(_errors(attend, inputs, window=10)) > 100 * ROUNDING  # the control


def test_toy_mask_on_one_device_matches_oracle_and_skips_tiles(inputs):
    @dataclasses.dataclass(frozen=True)
    class Halves(Mask):
        """Two halves that do not see each other; tiles of one half alone are full, of both empty."""

        def visible(self, q_positions, k_positions):
            return (q_positions < T // 2) == (k_positions < T // 2)

        def bounds(self, q_low, q_high, k_low, k_high):
            first, last = (q_high < T // 2) & (k_high < T // 2), (q_low >= T // 2) & (k_low >= T // 2)
            apart = ((q_high < T // 2) & (k_low >= T // 2)) | ((k_high < T // 2) & (q_low >= T // 2))
            return apart, first | last

    def attend(q, k, v):
        return ra.blockwise_attention(q, k, v, extra_mask=Halves(), block_sizes=ra.BlockSizes(q=12, kv=12))

    assert max(_errors(attend, inputs, extra_mask=Halves())) < ROUNDING
    far = [x.at[:, T // 2 :].set(jnp.nan) for x in inputs[:3]]
    assert np.isfinite(attend(*far)[:, : T // 2]).all()  # tiles that the mask empties are not computed


def test_fused_kernels_and_values_that_are_no_mask_are_refused(inputs):
    q, k, v = (x.astype("bfloat16") for x in inputs[:3])
    with pytest.raises(ValueError, match="extra_mask=3 must be a Mask that can be hashed"):
        ra.blockwise_attention(q, k, v, extra_mask=3)
    with pytest.raises(ValueError, match='impl="cudnn" has no extra_mask; leave it out, or use impl="xla"'):
        ra.blockwise_attention(q, k, v, extra_mask=Dilated(2), impl="cudnn")


def test_files_of_the_recipes_exist():
    recipes = (ROOT / "CONTRIBUTING.md").read_text().split("## Recipes")[1]
    named = re.findall(r"`((?:ring_attention|tests|docs)/[\w/.]+)`", recipes)
    assert len(named) > 8
    assert [path for path in named if not (ROOT / path).exists()] == []
