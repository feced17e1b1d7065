import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec
from model_attention import attention_alone

import ring_attention as ra
from ring_attention.models import transformer
from ring_attention.models.config import ModelConfig
from ring_attention.models.rope import RopeConfig
from ring_attention.models.transformer import resized_parameters
from ring_attention.testing import random_qkv, relative_error
from ring_attention.training.config import AttentionConfig, MeshConfig, OptimizerConfig, TrainConfig
from ring_attention.training.state import abstract_state, make_optimizer, make_schedule, make_state
from ring_attention.training.step import BATCH_SPEC, make_eval_step, make_gradients, make_train_step

SEQ_LEN, ROWS = 48, 4
MODEL = ModelConfig(vocab_size=32, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24)


def _config(layout="zigzag", accumulation_steps=1, **mesh):
    return TrainConfig(
        name="step",
        model=MODEL,
        seq_len=SEQ_LEN,
        num_steps=200,
        batch_size=ROWS,
        mesh=MeshConfig(**mesh),
        attention=AttentionConfig(layout=layout, block_q=8, block_kv=8),
        optimizer=OptimizerConfig(accumulation_steps=accumulation_steps),
    )


def _natural_batch():
    """Packed rows whose targets that count lie unevenly: few in the first row and in the second half of the others."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (ROWS, SEQ_LEN + 1))
    segment_ids = np.sort(rng.integers(1, 4, (ROWS, SEQ_LEN)), axis=1)
    first = np.array([[np.flatnonzero(row == s)[0] for s in row] for row in segment_ids])
    odds = np.where(np.arange(SEQ_LEN) < SEQ_LEN // 2, 0.95, 0.2) * np.array([[0.05], [1], [1], [1]])
    batch = dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=np.arange(SEQ_LEN) - first,
        segment_ids=segment_ids,
        loss_mask=rng.random((ROWS, SEQ_LEN)) < odds,
    )
    return {name: field.astype(np.int32) for name, field in batch.items()}


def _dealt(batch, layout, mesh):
    layout = ra.SequenceLayout(layout, mesh.shape["sp"])
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {name: jax.device_put(layout.permute(field, 1), sharding) for name, field in batch.items()}


@pytest.fixture(scope="module")
def one_device():
    """`gradients(params, batch)` on one device, for a batch in natural order."""
    mesh = ra.make_mesh(devices=jax.devices()[:1])
    gradients = jax.jit(make_gradients(_config(sp=1), mesh))
    return lambda params, batch: jax.tree.map(np.asarray, gradients(params, _dealt(batch, "zigzag", mesh)))


@pytest.fixture(scope="module")
def alone(one_device):
    """(params, grads, loss, targets) on one device, from the same seed, all in NumPy."""
    state = make_state(_config(sp=1), ra.make_mesh(devices=jax.devices()[:1]))
    params = jax.tree.map(np.asarray, state.params)
    return params, *one_device(params, _natural_batch())


CASES = [
    ("zigzag", 1, dict(sp=8)),
    ("striped", 2, dict(dp=2, sp=4)),
    ("contiguous", 2, dict(fsdp=2, sp=2, tp=2)),
    ("zigzag", 1, dict(dp=2, fsdp=2, sp=1, tp=2)),
]
QUICK = CASES[2]


@pytest.mark.parametrize(
    ("layout", "accumulation_steps", "shape"),
    [pytest.param(*case, marks=[] if case == QUICK else pytest.mark.slow, id=str(case)) for case in CASES],
)
def test_gradients_on_eight_devices_are_those_on_one(layout, accumulation_steps, shape, alone):
    params, grads, loss, targets = alone
    mesh = ra.make_mesh(**shape)
    gradients = jax.jit(make_gradients(_config(layout, accumulation_steps, **shape), mesh))
    got_grads, got_loss, got_targets = gradients(params, _dealt(_natural_batch(), layout, mesh))
    assert got_targets == targets == _natural_batch()["loss_mask"].sum()
    assert abs(got_loss - loss) < 1e-5 * loss
    distances = jax.tree.leaves(jax.tree.map(relative_error, got_grads, grads))
    assert max(distances) < 1e-5


def _sums_over_dp(jaxpr, in_loop=False):
    """(whether it is in a loop) of each sum of an array, not of a number, over dp."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("psum") and "dp" in eqn.params["axes"]:
            yield from (in_loop for x in eqn.invars if x.aval.ndim)
        for inner in jaxprs_in_params(eqn.params):
            yield from _sums_over_dp(inner, in_loop or eqn.primitive.name == "scan")


@pytest.mark.parametrize(("micro_batches", "in_loops"), [(1, True), (2, False)])
def test_gradients_of_micro_batches_are_summed_over_dp_after_them(micro_batches, in_loops):
    config = _config(accumulation_steps=micro_batches, dp=2, sp=1)
    mesh = ra.make_mesh(dp=2, sp=1, devices=jax.devices()[:2])
    params = abstract_state(config, dict(mesh.shape)).params
    jaxpr = jax.make_jaxpr(make_gradients(config, mesh))(params, _natural_batch())
    found = list(_sums_over_dp(jaxpr.jaxpr))
    assert len(found) >= len(jax.tree.leaves(params))
    assert any(found) == in_loops


def test_gradients_of_a_mean_of_means_would_differ(one_device, alone):
    # The control of the tolerance above: what a step that normalises on each device gives for the same batch.
    params, grads, loss, _ = alone
    batch = _natural_batch()
    halves = [np.arange(SEQ_LEN) < SEQ_LEN // 2, np.arange(SEQ_LEN) >= SEQ_LEN // 2]
    parts = [one_device(params, batch | dict(loss_mask=batch["loss_mask"] * half)) for half in halves]
    mean_grads = jax.tree.map(lambda a, b: (a + b) / 2, parts[0][0], parts[1][0])
    assert abs((parts[0][1] + parts[1][1]) / 2 - loss) > 1e-3 * loss
    assert min(jax.tree.leaves(jax.tree.map(relative_error, mean_grads, grads))) > 1e-3


@pytest.mark.slow
def test_attention_of_config_has_its_window_and_softcap():
    config = AttentionConfig(layout="zigzag", window=7, softcap=1.5, duplex=True, block_q=8, block_kv=8)
    mesh, layout = ra.make_mesh(sp=2, devices=jax.devices()[:2]), ra.SequenceLayout("zigzag", 2)
    q, k, v, _ = random_qkv(0, 2, SEQ_LEN, 4, 2, 4)
    spec = PartitionSpec(None, "sp")

    def error(config, **mask):
        attend = attention_alone(config, MODEL, mesh.shape["sp"])
        attend = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))
        got = layout.unpermute(attend(*(layout.permute(x, 1) for x in (q, k, v))), 1)
        return relative_error(got, ra.reference_attention(q, k, v, **mask))

    assert error(config, window=7, softcap=1.5) < 1e-6
    assert min(error(config, window=8, softcap=1.5), error(config, window=7)) > 1e-3  # the controls
    assert error(dataclasses.replace(config, window=0, softcap=0.0)) < 1e-6


@pytest.mark.parametrize("field", ["window", "softcap"])
def test_attention_config_refuses_negative_window_or_softcap(field):
    with pytest.raises(ValueError, match=f"attention.{field}=-1: must not be negative; 0 leaves it out"):
        AttentionConfig(**{field: -1})


def test_train_step_updates_and_measures_like_evaluation(alone):
    params, grads, loss, targets = alone
    config, mesh = _config(sp=4, tp=2), ra.make_mesh(sp=4, tp=2)
    state, batch = make_state(config, mesh), _dealt(_natural_batch(), "zigzag", mesh)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)  # the same seed on any mesh
    nats, counted = make_eval_step(config, mesh)(state.params, batch)
    assert abs(nats / counted - loss) < 1e-5 * loss
    assert counted == targets

    want = optax.apply_updates(params, _updates(config.optimizer, grads, params))
    after, metrics = make_train_step(config, mesh)(state, batch)
    assert after.step == 1
    assert abs(metrics["loss"] - loss) < 1e-5 * loss
    assert metrics["targets"] == targets
    assert abs(metrics["grad_norm"] - optax.tree.norm(grads)) < 1e-4 * metrics["grad_norm"]
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, (after.params, want), (params, params))
    assert max(jax.tree.leaves(jax.tree.map(relative_error, *change))) < 1e-2  # AdamW's first update is nearly a sign
    assert min(float(np.abs(x).max()) for x in jax.tree.leaves(change[0])) > 0


def test_train_step_on_three_devices_pads_parameters_and_shards_them(alone):
    params, grads, loss, targets = alone
    config, mesh = _config(sp=3), ra.make_mesh(sp=3, devices=jax.devices()[:3])
    state, batch = make_state(config, mesh), _dealt(_natural_batch(), "zigzag", mesh)
    query = state.params["layers"]["attention"]["query"]
    assert (query.shape, query.addressable_shards[0].data.shape) == ((2, 18, 4, 4), (2, 6, 4, 4))  # of a width of 16
    jax.tree.map(np.testing.assert_array_equal, resized_parameters(state.params, MODEL), params)

    after, metrics = make_train_step(config, mesh)(state, batch)
    assert abs(metrics["loss"] - loss) < 1e-5 * loss
    assert metrics["targets"] == targets
    norm = optax.tree.norm(grads)
    assert abs(metrics["grad_norm"] - norm) < 1e-5 * norm
    moments = after.opt_state[1][0]
    assert moments.mu["embed"].addressable_shards[0].data.shape == (32, 6)
    optimizer = config.optimizer
    scale = (1 - optimizer.b1) * min(1, optimizer.clip_norm / norm)
    got = jax.tree.map(lambda mu: mu / scale, resized_parameters(moments.mu, MODEL))
    assert max(jax.tree.leaves(jax.tree.map(relative_error, got, grads))) < 1e-5
    for padded in (after.params, moments.mu, moments.nu):  # what pads is 0 and stays so
        again = resized_parameters(resized_parameters(padded, MODEL), MODEL, mesh.shape)
        jax.tree.map(np.testing.assert_array_equal, padded, again)
    want = optax.apply_updates(params, _updates(optimizer, grads, params))
    changed = jax.tree.map(np.subtract, (resized_parameters(after.params, MODEL), want), (params, params))
    assert max(jax.tree.leaves(jax.tree.map(relative_error, *changed))) < 1e-2


def test_train_step_without_targets_gives_zero_and_no_nan(one_device, alone):
    params, *_ = alone
    batch = _natural_batch() | dict(loss_mask=np.zeros((ROWS, SEQ_LEN), np.int32))
    grads, loss, targets = one_device(params, batch)
    assert loss == targets == 0
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


# --- The optimizer ----------------------------------------------------------------------------------------------------


def _updates(optimizer_config, grads, params):
    config = dataclasses.replace(_config(sp=1), optimizer=optimizer_config)
    optimizer = make_optimizer(config)
    return jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])(grads, params)


def test_optimizer_decays_matrices_and_not_norms(alone):
    params, *_ = alone
    zero = jax.tree.map(jnp.zeros_like, params)
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    updates = _updates(optimizer, zero, params)
    decayed = {}
    for (path, update), parameter in zip(jax.tree.leaves_with_path(updates), jax.tree.leaves(params), strict=True):
        name = jax.tree_util.keystr(path)
        decayed[name] = bool(np.any(update))
        if decayed[name]:
            np.testing.assert_allclose(update, -0.1 * 0.5 * parameter, rtol=1e-5)
    assert {name for name, decays in decayed.items() if not decays} == {
        "['layers']['attention_norm']['scale']",
        "['layers']['feedforward_norm']['scale']",
        "['norm']['scale']",
    }
    assert sum(decayed.values()) == 9  # embedding, unembedding, four of attention, three of the feed-forward


def test_schedule_warms_up_peaks_and_falls_to_its_fraction():
    optimizer = OptimizerConfig(learning_rate=2e-3, warmup_steps=9, final_fraction=0.1)
    schedule = make_schedule(dataclasses.replace(_config(sp=1), optimizer=optimizer, num_steps=200))
    np.testing.assert_allclose(schedule(0), 2e-4, rtol=1e-5)  # a tenth of the way, not 0
    np.testing.assert_allclose(schedule(4), 1e-3, rtol=1e-5)
    np.testing.assert_allclose(schedule(9), 2e-3, rtol=1e-5)
    np.testing.assert_allclose(schedule(200), 2e-4, rtol=1e-5)
    np.testing.assert_allclose(schedule((9 + 200) / 2), (2e-3 + 2e-4) / 2, rtol=1e-5)  # half the cosine
    rates = [float(schedule(step)) for step in range(201)]
    assert np.argmax(rates) == 9
    assert (np.diff(rates[9:]) < 0).all()


def test_optimizer_clips_by_global_norm(alone):
    params, grads, *_ = alone
    # With a large epsilon AdamW's first update is proportional to the gradient it gets.
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.0, epsilon=1e6, clip_norm=0.5)
    unit = jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)

    def norm(scale):
        updates = _updates(optimizer, jax.tree.map(lambda g: scale * g, unit), params)
        return float(optax.tree.norm(updates)) * 1e6

    np.testing.assert_allclose(norm(0.1), 0.1, rtol=1e-3)
    np.testing.assert_allclose(norm(0.4), 0.4, rtol=1e-3)
    np.testing.assert_allclose(norm(50.0), 0.5, rtol=1e-3)


@pytest.mark.parametrize("ring", [1, 8])
def test_dynamic_rope_takes_a_packed_row_for_one_sequence(ring, monkeypatch):
    lengths, real = [], transformer.rotary_tables

    def recording(*args, length):
        lengths.append(length)
        return real(*args, length=length)

    monkeypatch.setattr(transformer, "rotary_tables", recording)
    rope = RopeConfig(scaling="dynamic", factor=2.0, original_len=16)
    config = _config(sp=ring)
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, rope=rope))
    mesh = ra.make_mesh(sp=ring, devices=jax.devices()[:ring])
    params = jax.eval_shape(lambda: make_state(config, mesh).params)
    jax.eval_shape(make_eval_step(config, mesh), params, _natural_batch())
    assert lengths == [SEQ_LEN]


def test_train_step_traces_without_rank_promotion():
    mesh = ra.make_mesh(sp=2, tp=2, devices=jax.devices()[:4])
    config = _config(sp=2, tp=2)
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, qkv_bias=True, qk_norm=True))
    batch = {name: jax.ShapeDtypeStruct(field.shape, field.dtype) for name, field in _natural_batch().items()}
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        state = abstract_state(config)
        after, metrics = jax.eval_shape(make_train_step(config, mesh), state, batch)
    finally:
        jax.config.update("jax_numpy_rank_promotion", "allow")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
