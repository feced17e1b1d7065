"""What the compiled programs of a ring and of a training step send and hold."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as Spec
from oracle import dense_attention, random_qkv, random_segments

import ring_attention as ra
from ring_attention.models.config import ModelConfig
from ring_attention.parallel import ring
from ring_attention.planning import compiled
from ring_attention.training.config import MeshConfig, TrainConfig
from ring_attention.training.step import abstract_state, make_train_step

# T = P*t is larger than B*H*D, so that an array of t*T scores would be the largest of the program.
t, B, H, K, D = 128, 2, 6, 2, 4
BLOCKS = ra.BlockSizes(q=32, kv=32)
KV_BYTES = 2 * B * t * K * D * 4  # a device's K and V in float32; H/K times that if grouped queries were expanded


def _mesh(P):
    return ra.make_mesh(sp=P, devices=jax.devices()[:P])


def _lower_forward(P, dtype="float32", segments=False, attend=None):
    """The forward pass lowered for a ring of P devices that hold t tokens each."""
    mesh, (q, k, v, _) = _mesh(P), random_qkv(0, B, P * t, H, K, D, dtype=dtype)
    segment_ids = jnp.asarray(random_segments(1, B, P * t)) if segments else None
    attend = attend or functools.partial(ra.ring_attention, mesh=mesh, layout="zigzag", block_sizes=BLOCKS)
    return jax.jit(lambda q, k, v, segment_ids: attend(q, k, v, segment_ids=segment_ids)).lower(q, k, v, segment_ids)


def _lower_backward(P, dtype="float32", segments=False):
    """The backward pass alone: its residuals are arguments, so that nothing is shared with the forward pass."""
    q, k, v, dout = random_qkv(0, B, P * t, H, K, D, dtype=dtype)
    segment_ids = jnp.asarray(random_segments(1, B, P * t)) if segments else None
    attend = functools.partial(
        ra.ring_attention, mesh=_mesh(P), layout="zigzag", block_sizes=BLOCKS, segment_ids=segment_ids
    )
    vjp = jax.eval_shape(lambda q, k, v: jax.vjp(attend, q, k, v)[1], q, k, v)
    return jax.jit(lambda vjp, dout: vjp(dout)).lower(vjp, dout)


def _text(lowered):
    return lowered.compile().as_text()


@functools.cache
def _forward_of_eight():
    return _text(_lower_forward(8))


@functools.cache
def _backward_of_eight():
    return _text(_lower_backward(8))


@pytest.mark.parametrize("P", [2, 4, 8])
def test_forward_passes_keys_and_values_on_once_less_than_there_are_devices_and_sends_nothing_else(P):
    totals = compiled.totals(_forward_of_eight() if P == 8 else _text(_lower_forward(P)))
    assert totals == {"collective-permute": (2 * (P - 1), (P - 1) * KV_BYTES)}


def test_segment_ids_travel_along():
    totals = compiled.totals(_text(_lower_forward(4, segments=True)))
    assert totals == {"collective-permute": (9, 3 * (KV_BYTES + B * t * 4))}


def test_backward_passes_keys_and_values_on_and_their_gradients_once_more_to_get_home():
    assert compiled.totals(_backward_of_eight()) == {"collective-permute": (2 * 7 + 2 * 8, (7 + 8) * KV_BYTES)}


def _permuted(lowered):
    """dtypes and shapes of what is permuted, before the CPU's compiler turns bfloat16 into float32."""
    return set(re.findall(r"collective_permute.* -> tensor<(.*)>", lowered.as_text()))


def test_bfloat16_keys_and_values_travel_as_such_and_their_gradients_in_float32():
    here = f"{B}x{t}x{K}x{D}x"
    assert _permuted(_lower_forward(2, "bfloat16")) == {here + "bf16"}
    assert _permuted(_lower_backward(3, "bfloat16")) == {here + "bf16", here + "f32"}
    assert _permuted(_lower_backward(3, "bfloat16", True)) == {here + "bf16", here + "f32", f"{B}x{t}xi32"}


def test_no_array_holds_a_score_for_each_of_a_shards_queries_and_every_key():
    def widest(text):
        return max(array.size for array in compiled.arrays(text))

    scores = t * 8 * t
    assert widest(_forward_of_eight()) < scores / 8
    assert widest(_backward_of_eight()) < scores / 8
    mesh = _mesh(8)
    attend = jax.shard_map(  # the control: dense attention of a shard's queries to all keys
        lambda q, k, v: dense_attention(
            q, *(lax.all_gather(x, "sp", axis=1, tiled=True) for x in (k, v)), causal=False
        ),
        mesh=mesh,
        in_specs=(Spec(None, "sp"),) * 3,
        out_specs=Spec(None, "sp"),
    )
    control = _text(_lower_forward(8, attend=lambda q, k, v, segment_ids: attend(q, k, v)))
    assert widest(control) >= scores
    assert "all-gather" in compiled.totals(control)


def _temp_bytes(lowered):
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_depends_on_the_shard_and_not_on_the_number_of_devices(monkeypatch):
    two, four, eight = ([_temp_bytes(lower(P)) for lower in (_lower_forward, _lower_backward)] for P in (2, 4, 8))
    np.testing.assert_allclose(eight, four, rtol=0.1)
    np.testing.assert_array_less(two, np.multiply(1.1, four))  # two devices need no loop, and less memory

    def unrolled(self, body, carry, steps):
        return functools.reduce(body, steps, carry)

    monkeypatch.setattr(ring._Ring, "scan", unrolled)
    ring._sharded.cache_clear()
    jax.clear_caches()
    control = _temp_bytes(_lower_forward(8))  # the control: a program that starts all transfers at once
    ring._sharded.cache_clear()
    jax.clear_caches()
    assert control > 1.3 * eight[0]


def test_hops_are_the_turns_of_a_loop_whose_transfers_are_multiplied_out():
    forward, backward = _forward_of_eight(), _backward_of_eight()
    for text in (forward, backward):
        assert " while(" in text
    # P-1 turns forward; backward the first and the last hop stand outside
    assert {item.runs for item in compiled.collectives(forward)} == {7}
    assert {item.runs for item in compiled.collectives(backward)} == {1, 6}


# --- A training step --------------------------------------------------------------------------------------------------

SEQ_LEN, LAYERS = 208, 2  # neither the length nor the number of tokens is the size of a weight


@functools.cache
def _compiled_step(remat, **shape):
    model = ModelConfig(
        vocab_size=64,
        num_layers=LAYERS,
        model_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        remat=remat,
    )
    config = TrainConfig(
        name="structure", model=model, seq_len=SEQ_LEN, num_steps=200, batch_size=2, mesh=MeshConfig(**shape)
    )
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    field = jax.ShapeDtypeStruct((2, SEQ_LEN), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids", "loss_mask"), field)
    step = make_train_step(config, ra.make_mesh(**shape, devices=devices))
    return _text(step.lower(abstract_state(config), batch))


def _ring_permutes(text):
    """Runs of permutes of floating-point blocks: keys, values and their gradients, not segment ids."""
    found = compiled.collectives(text)
    return sum(item.runs for item in found if item.kind == "collective-permute" and item.arrays[0].dtype == "f32")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [dict(sp=8), dict(fsdp=2, sp=2, tp=2)], ids=str)
def test_a_training_step_never_gathers_the_sequence_and_runs_each_ring_once(shape):
    text, P = _compiled_step("attention", **shape), shape["sp"]
    found = compiled.collectives(text)
    gathered = {size for item in found if item.kind == "all-gather" for array in item.arrays for size in array.shape}
    assert gathered  # weights are
    assert gathered.isdisjoint({SEQ_LEN, 2 * SEQ_LEN})
    assert {item.kind for item in found} == {"all-gather", "all-reduce", "reduce-scatter", "collective-permute"}
    assert _ring_permutes(text) == LAYERS * (2 * (P - 1) + 2 * (P - 1) + 2 * P)


@pytest.mark.slow
def test_remat_of_all_but_attention_runs_no_ring_twice_and_full_remat_does():
    P, permutes = 8, {remat: _ring_permutes(_compiled_step(remat, sp=8)) for remat in ("attention", "full")}
    assert permutes["attention"] == LAYERS * (2 * (P - 1) + 2 * (P - 1) + 2 * P)
    assert permutes["full"] == permutes["attention"] + LAYERS * 2 * (P - 1)
