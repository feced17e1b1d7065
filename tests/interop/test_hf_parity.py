"""Our logits against those of transformers, for small random checkpoints of every family, far beyond their window."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.attention.mask_spec import MaskSpec
from ring_attention.attention.masks import Tokens, visible
from ring_attention.evaluation.position_loss import LossReader
from ring_attention.models.hf.loading import load_parameters
from ring_attention.models.hf.source import open_source
from ring_attention.models.rope import RopeConfig, frequencies, rotary_tables
from ring_attention.models.transformer import Transformer, parameter_specs
from ring_attention.training.attend import attention_of
from ring_attention.training.config import AttentionConfig
from ring_attention.training.trained_model import open_trained_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
masking_utils = pytest.importorskip("transformers.masking_utils")
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.interop

WINDOW, LENGTH = 64, 512
"""Positions that the models were made for, and tokens that they are given: eight times as many."""

BOUND = 1e-4
SHAPE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=WINDOW,
    bos_token_id=None,
    eos_token_id=None,
)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=WINDOW)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=WINDOW // 2,
)
ROPES = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=8.0),
    "dynamic": dict(rope_type="dynamic", factor=4.0),
    "yarn": YARN,
    "yarn-tuned": YARN | dict(beta_fast=2.5, beta_slow=0.5, attention_factor=1.3),
    "llama3": LLAMA3,
}
FAMILIES = {
    "llama": dict(model_type="llama"),
    "llama-tied": dict(model_type="llama", tie_word_embeddings=True, head_dim=24),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "mistral-window": dict(model_type="mistral", sliding_window=40),
    "qwen2": dict(model_type="qwen2", rms_norm_eps=1e-5),
    "qwen2-window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=100, max_window_layers=0),
    "qwen2-tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=24),
    "qwen3-window": dict(
        model_type="qwen3", head_dim=16, use_sliding_window=True, sliding_window=33, max_window_layers=0
    ),
}
VARIANTS = ("llama-tied", "qwen2-tied", "qwen2-window", "qwen3-window")
STRETCHED = [
    *(("llama", rope, 5e4) for rope in ROPES if rope != "default"),
    ("qwen3", "yarn", 1e6),
    ("qwen3", "dynamic", 1e6),
    ("qwen2", "linear", 1e6),
    ("mistral-window", "llama3", 1e6),
]
MESHES = {"alone": dict(sp=1), "sp8": dict(sp=8), "sp4-tp2": dict(sp=4, tp=2)}
TOKENS = np.random.default_rng(3).integers(0, SHAPE["vocab_size"], (1, LENGTH))


def make_checkpoint(folder, family, rope, theta):
    """A random checkpoint, saved in shards by transformers itself; every bias and norm is one that matters."""
    given = SHAPE | FAMILIES[family] | dict(rope_parameters=ROPES[rope] | dict(rope_theta=theta))
    config = transformers.AutoConfig.for_model(**given)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def their_logits(model, first=0, length=LENGTH):
    positions = torch.arange(first, first + length)[None]
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS[:, :length]), position_ids=positions).logits.numpy()


def our_logits(config, params, mesh, window, first=0, length=LENGTH):
    layout = ra.SequenceLayout("zigzag", mesh.shape["sp"])
    attention = AttentionConfig(layout="zigzag", window=window or 0)
    config = attention.completed(config)
    attend = attention_of(attention, config, mesh.shape["sp"])
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    spec = Spec(("dp", "fsdp"), "sp")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(parameter_specs(config), spec, spec), out_specs=Spec(*spec, "tp")
    )
    def run(params, tokens, positions):
        return nnx.merge(graph, params).logits(tokens, positions=positions, segment_ids=None, attend=attend)

    positions = np.arange(first, first + length)[None]
    dealt = (layout.permute(jnp.asarray(x, jnp.int32), 1) for x in (TOKENS[:, :length], positions))
    return np.asarray(layout.unpermute(run(params, *dealt), 1))


def require_equal_logits(folder, model, meshes):
    theirs = their_logits(model)
    assert 0.5 < theirs.std() < 10  # so that the bound is one for numbers of this size
    source = open_source(folder)
    assert len(source.files) > 1
    assert source.config.max_len == WINDOW
    for name in meshes:
        mesh = ra.make_mesh(**MESHES[name], devices=jax.devices()[: 1 if name == "alone" else 8])
        ours = our_logits(source.config.model, load_parameters(source, mesh), mesh, source.config.attention.window)
        assert np.abs(ours - theirs).max() < BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_each_family_are_those_of_transformers_on_any_mesh(tmp_path, family):
    meshes = ["sp4-tp2"] if family in VARIANTS else MESHES
    require_equal_logits(tmp_path, make_checkpoint(tmp_path, family, "default", 1e4), meshes)


@pytest.mark.parametrize(("family", "rope", "theta"), STRETCHED, ids=[f"{x[0]}-{x[1]}" for x in STRETCHED])
def test_logits_of_each_scaling_are_those_of_transformers_far_beyond_the_window(tmp_path, family, rope, theta):
    require_equal_logits(tmp_path, make_checkpoint(tmp_path, family, rope, theta), ["alone", "sp8"])


# --- Controls: each part of a model is one that the comparison sees ---------------------------------------------------


def _rope(**changes):
    def change(config, params):
        return dataclasses.replace(config, rope=dataclasses.replace(config.rope, **changes)), params

    return change


def _layers(name, convert):
    def change(config, params):
        attention = params["layers"]["attention"]
        return config, params | {
            "layers": params["layers"] | {"attention": attention | {name: convert(attention[name])}}
        }

    return change


def _swap_norms(config, params):
    layers = params["layers"]
    swapped = dict(attention_norm=layers["feedforward_norm"], feedforward_norm=layers["attention_norm"])
    return config, params | {"layers": layers | swapped}


def _no_scaling(config, params):
    return dataclasses.replace(config, rope=RopeConfig(theta=config.rope.theta)), params


def _interleave(x):  # pairs (x[2j], x[2j+1]) turn together, as in the original code of Llama
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


CONTROLS = {
    "linear left out": ("llama", "linear", _no_scaling),
    "dynamic left out": ("llama", "dynamic", _no_scaling),
    "yarn left out": ("llama", "yarn", _no_scaling),
    "llama3 left out": ("llama", "llama3", _no_scaling),
    "another theta": ("llama", "default", _rope(theta=1.1e4)),
    "another factor": ("llama", "linear", _rope(factor=7.5)),
    "another original length": ("llama", "dynamic", _rope(original_len=WINDOW - 4)),
    "attention factor left out": ("llama", "yarn", _rope(attention_factor=1.0)),
    "another beta": ("llama", "yarn-tuned", _rope(beta_fast=32.0)),
    "another low_freq_factor": ("llama", "llama3", _rope(low_freq_factor=1.2)),
    "query bias dropped": ("qwen2", "default", _layers("query_bias", jnp.zeros_like)),
    "value bias dropped": ("qwen2", "default", _layers("value_bias", jnp.zeros_like)),
    "norm of queries dropped": (
        "qwen3",
        "default",
        _layers("query_norm", lambda x: {"scale": jnp.ones_like(x["scale"])}),
    ),
    "norms swapped": ("llama", "default", _swap_norms),
    "key heads swapped": ("llama", "default", _layers("key", lambda x: x[:, :, ::-1])),
    "other pairs turned": (
        "llama",
        "default",
        lambda *x: _layers("key", _interleave)(*_layers("query", _interleave)(*x)),
    ),
    "another epsilon": (
        "qwen2",
        "default",
        lambda config, params: (dataclasses.replace(config, norm_epsilon=1e-3), params),
    ),
    "window of one less": ("mistral-window", "default", -1),
    "window of one more": ("mistral-window", "default", 1),
    "window left out": ("qwen3-window", "default", None),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_part_that_is_left_out_or_wrong_is_seen(tmp_path, control):
    family, rope, change = CONTROLS[control]
    model = make_checkpoint(tmp_path, family, rope, 1e4)
    source, mesh = open_source(tmp_path), ra.make_mesh(devices=jax.devices()[:1])
    config, params, window = source.config.model, load_parameters(source, mesh), source.config.attention.window
    if callable(change):
        config, params = change(config, params)
    else:
        window = change and window + change
    ours = our_logits(config, params, mesh, window, length=LENGTH // 2)
    assert np.abs(ours - their_logits(model, length=LENGTH // 2)).max() > 30 * BOUND


def test_losses_of_documents_of_any_length_with_dynamic_scaling_are_theirs_on_any_number_of_devices(tmp_path):
    model = make_checkpoint(tmp_path, "llama", "dynamic", 1e4)
    trained, attention = open_trained_model(str(tmp_path)), AttentionConfig(layout="zigzag")
    worst = {}
    for length in (WINDOW + 1, 101):  # ever longer: theirs remembers the longest
        with torch.no_grad():
            logits = model(torch.as_tensor(TOKENS[:, :length]), use_cache=False).logits[0]
        want = torch.nn.functional.cross_entropy(
            logits, torch.as_tensor(TOKENS[0, 1 : length + 1]), reduction="none"
        ).numpy()
        for size in (1, 8):
            mesh = ra.make_mesh(sp=size, devices=jax.devices()[:size])
            reader = LossReader(trained.config, attention, trained.load(mesh), mesh)
            got = reader.losses(TOKENS[:, : length + 1].astype(np.int32), rows=1)[0]
            worst[length, size] = np.abs(got - want).max()
    assert max(worst.values()) < BOUND, worst


# --- What transformers itself does ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 7, 300])
def test_a_window_shows_what_the_mask_of_transformers_shows(window):
    theirs = masking_utils.sliding_window_causal_mask_function(window)
    at = jnp.arange(40)
    queries, keys = Tokens(at[:, None]), Tokens(at[None])
    ours = np.asarray(visible(MaskSpec(scale=1.0, window=window), queries, keys))
    want = np.array([[bool(theirs(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(40)] for i in range(40)])
    np.testing.assert_array_equal(ours, want)
    other = np.asarray(visible(MaskSpec(scale=1.0, window=window + 1), queries, keys))
    assert (other != want).any() or window > 40  # the control


@pytest.mark.parametrize("position", [1_000, 10_000, 100_000, 1_000_000, 10_000_000])
def test_the_error_of_float32_angles_grows_with_the_position_and_ours_does_not(tmp_path, position):
    model = make_checkpoint(tmp_path, "llama", "default", 1e4)
    rope = open_source(tmp_path).config.model.rope
    at = np.arange(position, position + 2048)
    exact = np.cos(at[:, None] * frequencies(rope, 16, 0))
    theirs = model.model.rotary_emb(torch.zeros(1), torch.as_tensor(at)[None])[0].numpy()[0, :, :8]
    ours = np.asarray(rotary_tables(jnp.asarray(at, jnp.int32), 16, rope)[0])
    errors = {name: np.abs(cos - exact).max() for name, cos in (("transformers", theirs), ("ours", ours))}
    print(position, errors)  # for docs/long_context.md: pytest -m interop -k grows -s
    assert errors["ours"] < 5e-7
    assert errors["transformers"] > 3e-9 * position


def _exact_tables(model):
    """Let transformers turn by angles that were worked out in float64 rather than float32."""

    def forward(x, position_ids):
        angles = position_ids[..., None].double() * model.model.rotary_emb.inv_freq.double()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().float(), angles.sin().float()

    model.model.rotary_emb.forward = forward
    exponents = torch.arange(0, 16, 2, dtype=torch.float64) / 16
    model.model.rotary_emb.inv_freq = 1e4**-exponents


def test_at_a_million_positions_ours_are_the_logits_of_exact_angles_which_float32_misses(tmp_path):
    model = make_checkpoint(tmp_path, "llama", "default", 1e4)
    source, mesh = open_source(tmp_path), ra.make_mesh(sp=8)
    far = dict(first=1_000_000, length=LENGTH // 2)
    ours = our_logits(source.config.model, load_parameters(source, mesh), mesh, 0, **far)
    shipped = np.abs(ours - their_logits(model, **far)).max()
    _exact_tables(model)
    exact = np.abs(ours - their_logits(model, **far)).max()
    assert exact < BOUND
    assert shipped > 30 * BOUND  # the control: transformers as it is, whose angles there are off by up to 0.03 radians
