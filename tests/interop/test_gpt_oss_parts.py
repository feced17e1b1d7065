"""The parts of gpt-oss beside its experts, as transformers computes them: attention with sinks, and the gate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick_compile import OPTIONS

import ring_attention as ra
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.layers import Attention, _activated
from ring_attention.models.rope import RopeConfig, Rotary, rotary_tables
from ring_attention.parallel.sharding import spec_of
from ring_attention.testing import relative_error
from ring_attention.training.attend import attention_of
from ring_attention.training.config import AttentionConfig

torch = pytest.importorskip("torch")
gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("plain_kernel")]

M, H, K, D, T, WINDOW = 32, 4, 2, 16, 64, 24
MODEL = ModelConfig(
    vocab_size=8,
    num_layers=1,
    model_dim=M,
    num_heads=H,
    num_kv_heads=K,
    head_dim=D,
    ffn_dim=8,
    rope=RopeConfig(theta=150_000.0),
    qkv_bias=True,
    out_bias=True,
)
NAMES = {"query": ("q_proj", (M, H, D)), "key": ("k_proj", (M, K, D)), "value": ("v_proj", (M, K, D))}


def theirs(window):
    """(their attention with random weights, out, gradients by the names of our parameters) of `x()`."""
    config = gpt_oss.GptOssConfig(
        hidden_size=M,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=D,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=WINDOW,
        attention_bias=True,
        attn_implementation="eager",
        rope_parameters=dict(rope_type="default", rope_theta=150_000.0),
    )
    torch.manual_seed(0)
    attention = gpt_oss.GptOssAttention(config, 0 if window else 1)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(attention.sinks, mean=1.0)
    positions = torch.arange(T)
    behind = positions[:, None] - positions[None]
    seen = (behind >= 0) & (behind < (window or T))
    mask = torch.zeros(T, T).masked_fill(~seen, -1e30)[None, None]
    inputs = torch.tensor(x(), requires_grad=True)
    tables = gpt_oss.GptOssRotaryEmbedding(config)(inputs, positions[None])
    out, _ = attention(inputs, tables, mask)
    (out * torch.tensor(cotangent())).sum().backward()
    as_numpy = lambda get: parameters_of(attention, get) | {"x": inputs.grad.numpy()}  # noqa: E731
    return (
        parameters_of(attention, lambda p: p.detach().numpy()),
        out.detach().numpy(),
        as_numpy(lambda p: p.grad.numpy()),
    )


def parameters_of(attention, get):
    """Our names for what `get` gives of each of their parameters, in our shapes."""
    found = {"sinks": get(attention.sinks), "out_bias": get(attention.o_proj.bias)}
    found["out"] = get(attention.o_proj.weight).T.reshape(H, D, M)
    for ours, (name, shape) in NAMES.items():
        layer = getattr(attention, name)
        found[ours] = get(layer.weight).T.reshape(shape)
        found[f"{ours}_bias"] = get(layer.bias).reshape(shape[1:])
    return found


@functools.cache
def x():
    return np.random.default_rng(1).standard_normal((1, T, M)).astype(np.float32)


@functools.cache
def cotangent():
    return np.random.default_rng(2).standard_normal((1, T, M)).astype(np.float32)


def ours(params, window, strategy="ring", sp=2, tp=2):
    """(out, gradients) of our attention layer on a mesh."""
    kind = LayerKind(window=window, sinks=True).completed(LayerKind(rope=MODEL.rope, chunk=0, softcap=0.0))
    attention = AttentionConfig(strategy=strategy, layout="contiguous")
    mesh = ra.make_mesh(sp=sp, tp=tp, devices=jax.devices()[: sp * tp])
    layer = nnx.eval_shape(lambda: Attention(MODEL, kind, nnx.Rngs(0)))
    graph, attend = nnx.graphdef(layer), attention_of(attention, MODEL, sp)
    specs = {name: spec_of(getattr(layer, name).axes) for name in params}
    tokens = jax.P(("dp", "fsdp"), "sp")

    def on_device(params, x_btM, positions_bt):
        tables = rotary_tables(positions_bt, D, MODEL.rope)
        return nnx.merge(graph, params)(x_btM, Rotary(tables, tables), None, jnp.int32(0), attend)

    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=(specs, tokens, tokens), out_specs=tokens)

    def loss(params, x):
        out = sharded(params, x, np.arange(T, dtype=np.int32)[None])
        return (out * cotangent()).sum(), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), compiler_options=OPTIONS)
    (_, out), (grads, dx) = run(params, x())
    return np.asarray(out), jax.device_get(grads | {"x": dx})


@pytest.mark.parametrize(("window", "strategy"), [(WINDOW, "ring"), (0, "ring"), (0, "ulysses")])
def test_attention_with_sinks_is_that_of_gpt_oss(window, strategy):
    params, want, dwant = theirs(window)
    out, grads = ours(params, window, strategy)
    assert np.abs(out - want).max() < 1e-4
    assert grads.keys() == dwant.keys()
    assert max(relative_error(grads[name], dwant[name]) for name in dwant) < 1e-4


def test_controls_of_sinks_differ():
    params, want, dwant = theirs(WINDOW)
    for change, window in [
        (dict(sinks=params["sinks"] + np.log(2, dtype=np.float32)), WINDOW),  # counted in each of two hops
        (dict(sinks=np.full(H, -1e9, np.float32)), WINDOW),
        ({}, WINDOW - 1),
    ]:
        out, grads = ours(params | change, window)
        assert np.abs(out - want).max() > 1e-3
        assert relative_error(grads["sinks"], dwant["sinks"]) > 1e-3


def test_clamped_gate_is_that_of_gpt_oss():
    config = gpt_oss.GptOssConfig(hidden_size=4, intermediate_size=8, num_local_experts=1)
    gate, up = 8 * np.random.default_rng(3).standard_normal((2, 1, 64, 8)).astype(np.float32)
    interleaved = np.stack([gate, up], axis=-1).reshape(1, 64, 16)
    want = gpt_oss.GptOssExperts(config)._apply_gate(torch.tensor(interleaved)).numpy()
    assert np.abs(np.asarray(_activated("clamped_silu", gate, up)) - want).max() < 1e-5
    assert np.abs(gate).max() > 7  # the clamp is met
    assert np.abs(np.asarray(_activated("silu", gate, up)) - want).max() > 1
