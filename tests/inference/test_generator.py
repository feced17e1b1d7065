"""What is generated with a cache is what the full forward pass says, token for token, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as Spec
from quick_compile import OPTIONS
from ring_helpers import quickly

import ring_attention as ra
from ring_attention.attention import cached
from ring_attention.inference import cache, generator, programs
from ring_attention.inference.cache import KeyValueCache
from ring_attention.inference.generator import Generator
from ring_attention.inference.sampling import Sampling
from ring_attention.models.config import ModelConfig
from ring_attention.models.rope import RopeConfig
from ring_attention.models.transformer import Transformer, model_builder, parameter_specs
from ring_attention.parallel import decode
from ring_attention.training.attend import attention_of
from ring_attention.training.config import AttentionConfig

MODEL = ModelConfig(
    vocab_size=40, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=24, ffn_chunk=5
)
CAPACITY, NEW = 56, 12
LENGTHS = (7, 37, 1)
ATTENTION = AttentionConfig(block_q=8, block_kv=4)
WINDOW = dataclasses.replace(ATTENTION, window=9)
MESHES = {
    "1": dict(sp=1),
    "2": dict(sp=2),
    "3": dict(sp=3),  # which does not divide the model's width
    "8": dict(sp=8),
    "sp4_tp2": dict(sp=4, tp=2),
    "dp2_sp2_tp2": dict(dp=2, sp=2, tp=2),
}
VARIANTS = {
    "window": (MODEL, WINDOW),
    "softcap": (MODEL, dataclasses.replace(ATTENTION, softcap=0.5)),
    "qwen": (dataclasses.replace(MODEL, qkv_bias=True, qk_norm=True, tied_embeddings=True), ATTENTION),
    "dynamic": (
        dataclasses.replace(MODEL, rope=RopeConfig(theta=100, scaling="dynamic", factor=4, original_len=16)),
        ATTENTION,
    ),
    "yarn": (
        dataclasses.replace(MODEL, rope=RopeConfig(theta=100, scaling="yarn", factor=4, original_len=16)),
        ATTENTION,
    ),
    "head_groups": (dataclasses.replace(MODEL, head_groups=2), ATTENTION),
}


@pytest.fixture(autouse=True)
def _compile_quickly(monkeypatch):
    monkeypatch.setattr(programs, "compiler_options", lambda mesh: OPTIONS)


def open_mesh(shape):
    return ra.make_mesh(**shape, devices=jax.devices()[: int(np.prod(list(shape.values())))])


@functools.cache
def parameters(model):
    """Parameters none of which is 0 or 1, so that each matters, and scores that are far apart."""
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(Transformer(model, nnx.Rngs(0)), nnx.Param)))
    rng = np.random.default_rng(3)
    return tree.unflatten([x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])


@functools.cache
def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(0, MODEL.vocab_size, length) for length in lengths]


def generated(model, attention, shape, capacity=CAPACITY, sampling=None, vocab_size=None, chunk=None, **arguments):
    """Tokens of each row; None where it has ended."""
    settings = dict(mesh=open_mesh(shape), capacity=capacity, sampling=sampling, vocab_size=vocab_size, chunk=chunk)
    params = parameters((attention or AttentionConfig()).completed(model))
    return _written(Generator(model, params, attention=attention, **settings), **arguments)


def _written(writer, new=NEW, lengths=LENGTHS, stop=(), seeds=0):
    steps = list(writer.generate(prompts(lengths), max_new_tokens=new, stop=stop, seeds=seeds))
    return [list(row) for row in zip(*steps, strict=True)]


def likeliest(model, attention, rows):
    """int32 [rows,T]: the token after each, by the forward pass of training on one device, with no cache."""
    tokens = np.zeros((len(rows), CAPACITY), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    model = attention.completed(model)
    mesh, build = open_mesh(dict(sp=1)), model_builder(model)
    attend = attention_of(dataclasses.replace(attention, layout="contiguous"), model, 1)

    def on_device(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(CAPACITY), tokens.shape)
        return build(params).logits(tokens, positions=positions, segment_ids=None, attend=attend)

    specs, out = (
        (parameter_specs(model), Spec(("dp", "fsdp"), "sp")),
        Spec(("dp", "fsdp"), "sp", "tp"),
    )
    run = quickly(jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=out))
    return np.asarray(run(parameters(model), tokens)).argmax(-1)


def wrong(model, attention, rows):
    """How many of the tokens are not the likeliest, given all before them."""
    following = likeliest(model, attention, [[*prompt, *row] for prompt, row in zip(prompts(), rows, strict=True)])
    found = [next_[p.size - 1 :][: len(row)] for next_, p, row in zip(following, prompts(), rows, strict=True)]
    return int(np.sum(np.array(found) != rows))


@functools.cache
def _writer_on_one_device():
    return Generator(MODEL, parameters(MODEL), mesh=open_mesh(MESHES["1"]), capacity=CAPACITY, attention=ATTENTION)


@functools.cache
def on_one_device():
    return _written(_writer_on_one_device())


# --- Exact ------------------------------------------------------------------------------------------------------------


def test_generate_greedily_agrees_with_the_full_forward_pass():
    rows = on_one_device()
    assert wrong(MODEL, ATTENTION, rows) == 0
    assert all(len(set(row)) > 3 for row in rows), "no row repeats itself, so that a mistake would show"
    assert wrong(MODEL, WINDOW, rows) > NEW / 2, "the control: another attention"


@pytest.mark.parametrize(
    "name", ["3", "dp2_sp2_tp2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("2", "8", "sp4_tp2"))]
)
def test_generate_agrees_on_any_mesh(name):
    assert generated(MODEL, ATTENTION, MESHES[name]) == on_one_device()


@pytest.mark.parametrize(
    "name",
    ["window", "qwen", *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS if n not in ("window", "qwen"))],
)
def test_generate_agrees_for_other_models(name):
    model, attention = VARIANTS[name]
    rows = generated(model, attention, MESHES["2"])
    assert wrong(model, attention, rows) == 0
    if name != "head_groups":  # which changes nothing
        assert rows != on_one_device(), "the control: the variant matters"


@pytest.mark.parametrize(
    "strategy",
    [
        "all_gather",
        pytest.param("ulysses", marks=pytest.mark.slow),
        pytest.param("usp", marks=pytest.mark.slow),
        pytest.param("ring_self_attention", marks=pytest.mark.slow),
    ],
)
def test_generate_agrees_whatever_strategy_reads_prompts(strategy):
    attention = dataclasses.replace(ATTENTION, strategy=strategy)
    assert generated(MODEL, attention, MESHES["2"], new=3) == [row[:3] for row in on_one_device()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single_device", "sliding_window"])
def test_generate_agrees_by_strategies_of_one_device(strategy):
    window = 0 if strategy == "single_device" else CAPACITY
    attention = dataclasses.replace(ATTENTION, strategy=strategy, window=window)
    assert generated(MODEL, attention, MESHES["1"], new=3) == [row[:3] for row in on_one_device()]


@pytest.mark.slow
def test_generate_in_bfloat16_nearly_always_takes_the_likeliest():
    model = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    rows = generated(model, ATTENTION, MESHES["2"])
    assert wrong(model, ATTENTION, rows) <= 2
    assert wrong(model, WINDOW, rows) > NEW / 2, "the control"


def test_generate_row_is_independent_of_others_and_padding():
    alone = generated(MODEL, ATTENTION, MESHES["2"], lengths=LENGTHS[:1])
    assert alone == [on_one_device()[0]]
    assert generated(MODEL, ATTENTION, MESHES["2"], capacity=300) == on_one_device()


def test_generate_ends_a_row_at_a_stop_token_alone():
    rows = on_one_device()
    stop = rows[0][4]
    first = [row.index(stop) if stop in row else NEW - 1 for row in rows]
    steps = max(first) + 1
    want = [row[: end + 1] + [None] * (steps - end - 1) for row, end in zip(rows, first, strict=True)]
    assert _written(_writer_on_one_device(), stop=[stop]) == want
    assert len(set(first)) > 1
    assert _written(_writer_on_one_device(), stop=range(40)) == [row[:1] for row in rows]


def test_generate_pads_prompts_to_few_lengths():
    writer = Generator(MODEL, parameters(MODEL), mesh=open_mesh(MESHES["2"]), capacity=CAPACITY)
    tokens = writer.generate(prompts(), max_new_tokens=NEW)
    assert next(tokens) == [row[0] for row in on_one_device()]
    assert next(tokens) == [row[1] for row in on_one_device()]
    lengths = {writer._padded_prompt(n) for n in range(1, CAPACITY + 1)}
    assert all(length % 2 == 0 for length in lengths)
    large = Generator(MODEL, parameters(MODEL), mesh=open_mesh(MESHES["8"]), capacity=100_000)
    assert large.slots == 12_500
    lengths = [large._padded_prompt(n) for n in range(1, 100_001)]
    assert len(set(lengths)) < 100
    assert all(n <= padded < max(1.13 * n, n + 8) for n, padded in enumerate(lengths, start=1))
    assert all(length % 8 == 0 for length in lengths)


# --- Sampling ---------------------------------------------------------------------------------------------------------

WARM = Sampling(temperature=1.0)


@pytest.mark.slow
def test_generate_samples_by_the_rows_seed_not_the_mesh():
    rows = generated(MODEL, ATTENTION, MESHES["1"], sampling=WARM, seeds=5)
    assert generated(MODEL, ATTENTION, MESHES["sp4_tp2"], sampling=WARM, seeds=[5, 6, 7]) == rows
    alone = generated(MODEL, ATTENTION, MESHES["2"], sampling=WARM, seeds=[5], lengths=LENGTHS[:1])
    assert alone == rows[:1]
    assert generated(MODEL, ATTENTION, MESHES["1"], sampling=WARM, seeds=6) != rows
    assert rows != on_one_device()


def test_generate_gives_no_tokens_unknown_to_the_tokenizer():
    rows = generated(MODEL, ATTENTION, MESHES["2"], sampling=Sampling(temperature=5.0), vocab_size=3, new=6)
    assert {token for row in rows for token in row} <= {0, 1, 2}
    assert max(token for row in on_one_device() for token in row) > 2


# --- Mutants ----------------------------------------------------------------------------------------------------------


def _token_goes_elsewhere(patch):
    with_tokens = KeyValueCache.with_tokens
    mutant = lambda self, layer, k, v, at, ends, **rest: with_tokens(self, layer, k, v, at + 1, ends + 1, **rest)  # noqa: E731
    patch.setattr(KeyValueCache, "with_tokens", mutant)


def _token_is_not_kept(patch):
    patch.setattr(KeyValueCache, "with_tokens", lambda self, *_, **__: self)


def _prompt_goes_to_another_layer(patch):
    with_prompt = KeyValueCache.with_prompt
    patch.setattr(KeyValueCache, "with_prompt", lambda self, layer, k, v: with_prompt(self, 1 - layer, k, v))


def _newest_token_is_not_seen(patch):
    attend = programs.decode_attention_shard
    mutant = lambda *args, lengths, **rest: attend(*args, lengths=lengths - 1, **rest)  # noqa: E731
    patch.setattr(programs, "decode_attention_shard", mutant)


def _rotary_is_one_token_behind(patch):
    with_cache = Transformer.with_cache

    def mutant(self, tokens, *, positions, **rest):
        late = positions - (tokens.shape[1] == 1)
        return with_cache(self, tokens, positions=late, **rest)

    patch.setattr(Transformer, "with_cache", mutant)


def _shares_are_not_merged(patch):
    patch.setattr(decode, "_merged", lambda state, axis: jax.tree.map(lambda x: jax.lax.pmax(x, axis), state))


def _every_row_ends_where_the_longest_does(patch):
    compile_ = Generator._compile_prefill

    def mutant(self, rows, tokens):
        prefill = compile_(self, rows, tokens)

        def run(params, tokens, lengths, seeds):
            longest = np.full(rows, max(LENGTHS), np.int32)
            return prefill(params, tokens, jax.device_put(longest, lengths.sharding), seeds)

        return run

    patch.setattr(Generator, "_compile_prefill", mutant)


MUTANTS = [
    _token_goes_elsewhere,
    _token_is_not_kept,
    _prompt_goes_to_another_layer,
    _newest_token_is_not_seen,
    _rotary_is_one_token_behind,
    _shares_are_not_merged,
    _every_row_ends_where_the_longest_does,
]


@pytest.mark.parametrize("mutate", MUTANTS)
def test_generate_mutants_are_seen(mutate, monkeypatch):
    on_one_device()
    mutate(monkeypatch)
    assert generated(MODEL, ATTENTION, MESHES["2"]) != on_one_device()


def test_cache_holds_what_was_promised():
    assert cached.as_bits(jnp.ones(2, jnp.bfloat16)).dtype == jnp.uint16
    assert cached.as_bits(jnp.ones(2)).dtype == jnp.float32
    run = MODEL.loop.runs[0]
    assert cache.cache_bytes(MODEL, run, rows=3, capacity=39, devices=4, tensor=2) == 2 * 2 * 3 * 10 * 1 * 6 * 4
    half = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    assert cache.cache_bytes(half, run, rows=3, capacity=10, devices=1, tensor=1) == 2 * 2 * 3 * 10 * 2 * 6 * 2


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(shape=dict(fsdp=2, sp=2)), "generation needs fsdp=1: shard rows over dp"),
        (dict(shape=dict(sp=2, tp=4)), "model.num_kv_heads=2 is not divisible by tp=4"),
        (dict(capacity=0), "capacity=0 must be a whole number of tokens"),
        (dict(capacity=48), "a prompt of 37 tokens and max_new_tokens=12 do not fit capacity=48; use capacity=49"),
        (dict(chunk=0), "chunk=0 must be a whole number of tokens"),
        (dict(new=0), "max_new_tokens=0 must be a whole number"),
        (dict(vocab_size=41), "vocab_size=41 must be 1 to model.vocab_size=40"),
        (dict(lengths=()), "got no prompts"),
        (dict(lengths=(3, 0)), "prompts[1] is empty"),
        (dict(seeds=[1]), "seeds=[1] must be a number"),
        (dict(seeds=-1), "seeds=-1 must be a number"),
        (dict(strategy="sparse"), "strategy='sparse' is not exact"),
        (dict(strategy="single_device"), "needs the whole sequence on one device"),
        (dict(strategy="sliding_window", window=9), 'layout="striped" deals them to all devices'),
    ],
    ids=str,
)
def test_generator_refuses_mistakes_before_compiling(change, words, monkeypatch):
    monkeypatch.setattr(generator, "make_prefill", None)
    change = dict(change)
    attention = dataclasses.replace(ATTENTION, **{n: change.pop(n) for n in ("strategy", "window") if n in change})
    shape = change.pop("shape", MESHES["2"])
    with pytest.raises(ValueError, match=".") as error:
        generated(MODEL, attention, shape, **change)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_generator_asks_the_strategy_about_window_and_softcap(monkeypatch):
    def refuse(self, context, shape, kv_heads, mask):
        raise ValueError(f"window={mask.window} softcap={mask.softcap}")

    attention = dataclasses.replace(WINDOW, softcap=0.5)
    monkeypatch.setattr(type(attention.make_strategy()), "check", refuse)
    with pytest.raises(ValueError, match=r"window=9 softcap=0\.5"):
        generated(MODEL, attention, MESHES["2"])
    with pytest.raises(ValueError, match="window=None softcap=None"):
        generated(MODEL, ATTENTION, MESHES["2"])


def test_generator_refuses_tokens_and_params_of_another_model():
    mesh = open_mesh(MESHES["1"])
    with pytest.raises(ValueError, match="params are those of another model"):
        Generator(dataclasses.replace(MODEL, qk_norm=True), parameters(MODEL), mesh=mesh, capacity=9)
    writer = Generator(MODEL, parameters(MODEL), mesh=mesh, capacity=9)
    with pytest.raises(ValueError, match=r"prompts\[0\] holds 40, need 0 to 39"):
        writer.generate([np.array([40])], max_new_tokens=1)
