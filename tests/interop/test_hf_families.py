"""Each family against transformers: logits, gradients, continuations, and folders written again, with controls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_families import CONFIGS, random_model
from hf_folders import contents
from jax.sharding import PartitionSpec as Spec
from quick_compile import OPTIONS

import ring_attention as ra
from ring_attention.inference.generator import Generator
from ring_attention.models.hf.export import write_again, write_standard
from ring_attention.models.hf.loading import load_parameters
from ring_attention.models.hf.manifest import write_manifest
from ring_attention.models.hf.names import tensors_of
from ring_attention.models.hf.source import open_source
from ring_attention.models.transformer import model_builder, parameter_specs
from ring_attention.training.attend import attention_of
from ring_attention.training.trained_model import open_trained_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.interop

LENGTH, BOUND = 96, 1e-4
"""Tokens, which are more than the models were made for; and the most that logits may differ by."""

TOKENS = np.random.default_rng(3).integers(3, 128, (1, LENGTH + 1))
OF_EACH_PART = ("gemma2", "gemma3_text", "qwen2", "olmo3")
"""Families that have all the parts between them."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) -> (the model of transformers, the folder that it was saved to)."""

    @functools.cache
    def made(name):
        model, folder = random_model(name), tmp_path_factory.mktemp("hf") / name
        model.save_pretrained(folder)
        return model, folder

    return made


def mesh_of(size):
    return ra.make_mesh(sp=size, devices=jax.devices()[:size])


def compiled(function, mesh, config, out_specs, *, attend=None):
    """function(model, tokens, targets, positions=..., segment_ids=..., attend=...) on a mesh, compiled quickly."""
    size = mesh.shape["sp"]
    transformer, layout = config.transformer, config.attention.make_layout(size)
    attend = attend or attention_of(config.attention, transformer, size)
    spec, build = Spec(("dp", "fsdp"), "sp"), model_builder(transformer)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(parameter_specs(transformer), spec, spec, spec), out_specs=out_specs
    )
    def run(params, tokens, targets, positions):
        return function(build(params), tokens, targets, positions=positions, segment_ids=None, attend=attend)

    dealt = [layout.permute(jnp.asarray(x, jnp.int32), 1) for x in (TOKENS[:, :-1], TOKENS[:, 1:])]
    dealt.append(layout.permute(jnp.arange(LENGTH)[None], 1))
    return (lambda params: run(params, *dealt)), layout


def our_logits(config, params, mesh, **options):
    logits = lambda model, tokens, targets, **others: model.logits(tokens, **others)  # noqa: E731
    run, layout = compiled(logits, mesh, config, Spec(("dp", "fsdp"), "sp", "tp"), **options)
    out = jax.jit(run).lower(params).compile(OPTIONS)(params)
    return np.asarray(layout.unpermute(out, 1))


def their_logits(model):
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS[:, :-1])).logits.numpy()


def changed(config, **attention):
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, **attention))


PLACES = [(name, size, strategy) for name in CONFIGS for size, strategy in ((1, "ring"), (2, "ulysses"))]
PLACES += [(name, 8, "ring") for name in OF_EACH_PART]


@pytest.mark.parametrize(("name", "size", "strategy"), PLACES)
def test_logits_are_those_of_transformers_beyond_window_and_positions(checkpoint, name, size, strategy):
    model, folder = checkpoint(name)
    trained, mesh, theirs = open_trained_model(str(folder)), mesh_of(size), their_logits(model)
    assert 0.5 < theirs.std() < 10  # so that the bound is one for numbers of this size
    ours = our_logits(changed(trained.config, strategy=strategy), trained.load(mesh), mesh)
    assert np.abs(ours - theirs).max() < BOUND


@pytest.mark.parametrize("name", OF_EACH_PART)
def test_gradients_of_the_loss_are_those_of_autograd(checkpoint, name):
    model, folder = checkpoint(name)
    model.zero_grad()
    torch.nn.functional.cross_entropy(
        model(torch.as_tensor(TOKENS[:, :-1])).logits[0], torch.as_tensor(TOKENS[0, 1:])
    ).backward()
    theirs = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    trained, mesh = open_trained_model(str(folder)), mesh_of(2)

    def loss(model, tokens, targets, **others):
        return jax.lax.psum(model.token_losses(tokens, targets, **others).sum(), ("dp", "fsdp", "sp")) / LENGTH

    params = trained.load(mesh)
    gradient = jax.grad(compiled(loss, mesh, trained.config, Spec())[0])
    ours = jax.jit(gradient).lower(params).compile(OPTIONS)(params)
    ours = flatten_dict(ours, sep=".")
    seen = set()
    for tensor in tensors_of(trained.source.config).values():
        parts = [
            part.to_tensor(np.asarray(ours[part.parameter] if part.layer is None else ours[part.parameter][part.layer]))
            for part in tensor.parts
        ]
        want, got = theirs[tensor.name], np.concatenate(parts)
        seen.add(tensor.name)
        assert np.abs(got - want).max() < BOUND * np.abs(want).max(), tensor.name
    assert seen == set(theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_import_is_written_again_byte_by_byte_and_anew_with_the_same_logits(checkpoint, name, tmp_path):
    model, folder = checkpoint(name)
    source, mesh, quiet = open_source(folder), mesh_of(1), lambda name, size: None
    params = load_parameters(source, mesh)
    for written in ("again", "anew"):
        (tmp_path / written).mkdir()
    write_again(write_manifest(source, tmp_path / "hf"), params, source.config, tmp_path / "again", quiet)
    assert contents(tmp_path / "again") == contents(folder)
    text = dataclasses.replace(source.config, wrapper="")
    write_standard(params, text, "float32", tmp_path / "anew", quiet, extra={"pad_token_id": None})
    anew = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "anew", attn_implementation="eager").eval()
    np.testing.assert_array_equal(their_logits(anew), their_logits(model))


NEW = 64
PROMPTS = [TOKENS[0, :21], TOKENS[0, 30:37]]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_continuations_are_those_of_transformers(checkpoint, name):
    model, folder = checkpoint(name)
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = []
    for prompt in PROMPTS:
        tokens = torch.as_tensor(prompt)[None]
        want.append(
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, prompt.size :].tolist()
        )
    writer = Generator.of(open_trained_model(str(folder)), mesh=mesh_of(2), capacity=LENGTH)
    ours = [list(row) for row in zip(*writer.generate(PROMPTS, max_new_tokens=NEW), strict=True)]
    assert ours == want
    assert all(len(set(row)) > 5 for row in want)


# --- Controls: each part of a model is one that the comparison sees ---------------------------------------------------


def _kinds(change):
    """Change each kind of layer."""

    def changed(config):
        kinds = tuple(change(kind, config.model) for kind in config.model.layers)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, layers=kinds))

    return changed


def _model(**fields):
    return lambda config: dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def _window(more):
    return _kinds(lambda kind, model: dataclasses.replace(kind, window=kind.window and kind.window + more))


CONTROLS = {
    "a window of one more": ("gemma2", _window(1)),
    "a window of one less": ("olmo3", _window(-1)),
    "windows in the other layers": (
        "gemma2",
        _kinds(lambda kind, model: dataclasses.replace(kind, window=None if kind.window else 8)),
    ),
    "rotary positions of the other kind of layer": (
        "gemma3_text",
        lambda config: dataclasses.replace(
            config,
            model=dataclasses.replace(
                config.model,
                rope=next(kind.rope for kind in config.model.layers if kind.rope),
                layers=tuple(
                    dataclasses.replace(kind, rope=config.model.rope if kind.rope else None)
                    for kind in config.model.layers
                ),
            ),
        ),
    ),
    "local layers scaled as the others": (
        "olmo3",
        _kinds(lambda kind, model: dataclasses.replace(kind, rope=None)),
    ),
    "no cap of scores": ("gemma2", lambda config: changed(config, softcap=0.0)),
    "no cap of logits": ("gemma3_text", _model(logit_softcap=0.0)),
    "norms by their weight alone": ("gemma2", _model(norm_zero_centered=False)),
    "scores by the root of the width of a head": ("gemma2", _model(attention_scale=0.0)),
    "embeddings as they are": ("gemma3_text", _model(embedding_scale=1.0)),
    "another activation": ("gemma2", _model(activation="silu")),
    "another epsilon": ("olmo2", _model(norm_epsilon=1e-3)),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_part_that_is_left_out_or_wrong_is_seen(checkpoint, control):
    name, change = CONTROLS[control]
    model, folder = checkpoint(name)
    trained, mesh = open_trained_model(str(folder)), mesh_of(1)
    ours = our_logits(change(trained.config), trained.load(mesh), mesh)
    assert np.abs(ours - their_logits(model)).max() > 10 * BOUND


@pytest.mark.parametrize("cap_first", [True, False])
def test_a_cap_after_the_mask_is_seen(checkpoint, cap_first):
    model, folder = checkpoint("gemma2")
    trained, mesh = open_trained_model(str(folder)), mesh_of(1)
    at = jnp.arange(LENGTH)

    def attend(q, k, v, this, *, segment_ids):
        cap, near = this.kind.softcap, this.kind.window or LENGTH
        groups = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
        s = jnp.einsum("bthd,bshd->bhts", q, k) * trained.model.score_scale
        seen = (at[:, None] >= at) & (at[:, None] - at < near)
        capped = lambda s: cap * jnp.tanh(s / cap)  # noqa: E731
        s = jnp.where(seen, capped(s), -jnp.inf) if cap_first else capped(jnp.where(seen, s, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v)

    apart = np.abs(our_logits(trained.config, trained.load(mesh), mesh, attend=attend) - their_logits(model)).max()
    assert (apart < BOUND) == cap_first
    assert cap_first or apart > 10 * BOUND
