"""A run that begins with the parameters of a trained model."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from hf_folders import LLAMA, MISTRAL, contents, write_folder

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.data.config import DataConfig
from ring_attention.models.hf.source import open_source
from ring_attention.models.rope import RopeConfig
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config import AttentionConfig
from ring_attention.training.flags import parse_config
from ring_attention.training.hf_conversion import export_hf, import_hf
from ring_attention.training.init_from import describe_initial, find_initial, has_begun, initial_state
from ring_attention.training.run_folder import RunFolder, open_run_folder
from ring_attention.training.state import make_state
from ring_attention.training.trained_model import config_of, open_trained_model


def _quiet(name, size):
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """hf/, its import imported/, and run/, a run that began with it and was trained no step."""
    path = tmp_path_factory.mktemp("folders")
    write_folder(path / "hf", LLAMA | {"rope_theta": 1e4}, dtype="bfloat16", shards=2)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[]))
    made.add_special_tokens(["<s>"])
    made.save(str(path / "hf" / "tokenizer.json"))
    mesh = ra.make_mesh(sp=8)
    import_hf(open_source(path / "hf"), path / "imported", mesh, _quiet)
    config = dataclasses.replace(begin_with(path / "hf"), run_dir=str(path / "run"))
    with open_run_folder(config) as folder, Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(1, initial_state(config, mesh, folder), {})
    return path


def begin_with(folder, hf=None, **changes):
    """The config of a run that begins with the model in `folder`, which is that of `hf`."""
    source = open_source(hf or folder)
    return dataclasses.replace(config_of(source.path, source.config), init_from=str(folder), **changes)


def of_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


@pytest.mark.parametrize("kind", ["hf", "imported", "run"])
def test_initial_state_takes_parameters_and_fresh_moments(folders, tmp_path, kind):
    mesh, config = ra.make_mesh(fsdp=2, sp=2, tp=2), begin_with(folders / kind, folders / "hf")
    state = initial_state(config, mesh, RunFolder(tmp_path))
    random = make_state(dataclasses.replace(config, init_from=""), mesh)
    jax.tree.map(np.testing.assert_array_equal, state.params, open_trained_model(str(folders / "hf")).load(mesh))
    for got, want in zip(jax.tree.leaves(state[2:]), jax.tree.leaves(random[2:]), strict=True):
        np.testing.assert_array_equal(got, want)
        assert (got.sharding, got.dtype) == (want.sharding, want.dtype)
    assert int(state.step) == 0
    assert not np.array_equal(state.params["embed"], random.params["embed"])  # the control
    assert open_trained_model(str(folders / "run")).manifest.shards == ("model-00001-of-00002.safetensors", *SECOND)
    assert contents(tmp_path / "hf" / "files") == contents(folders / "imported" / "hf" / "files")


SECOND = ("model-00002-of-00002.safetensors",)


def test_initial_state_keeps_what_an_export_needs(folders, tmp_path):
    export_hf(open_trained_model(str(folders / "run")), tmp_path / "out", ra.make_mesh(sp=8), _quiet)
    assert contents(tmp_path / "out") == contents(folders / "hf")


def test_find_initial_allows_other_rope_and_computation(folders):
    config = begin_with(folders / "hf")
    changes = dict(compute_dtype="bfloat16", remat="full", ffn_chunk=8, loss_chunk=4, head_groups=2, start_local=True)
    for field, value in changes.items():
        assert find_initial(of_model(config, **{field: value}))
    assert find_initial(of_model(config, rope=RopeConfig(theta=1e6)))
    assert find_initial(dataclasses.replace(config, init_from="")) is None


@pytest.mark.parametrize(
    ("field", "value", "theirs"),
    [
        ("num_layers", 4, 3),
        ("model_dim", 64, 32),
        ("num_kv_heads", 4, 2),
        ("head_dim", 16, 8),
        ("ffn_dim", 48, 40),
        ("vocab_size", 64, 48),
        ("norm_epsilon", 1e-6, 1e-5),
        ("tied_embeddings", True, False),
        ("qkv_bias", True, False),
        ("qk_norm", True, False),
    ],
)
def test_find_initial_refuses_another_model_by_field(folders, field, value, theirs):
    config = of_model(begin_with(folders / "hf"), **{field: value})
    with pytest.raises(ConfigError) as caught:
        find_initial(config)
    message = str(caught.value)
    assert message.startswith(f"model.{field}={value!r}: init_from='{folders / 'hf'}' holds a model with {theirs!r}; ")
    assert message.endswith(f"use --config.model.{field}={theirs}")


def test_find_initial_refuses_other_tokens_but_not_a_copy(folders, tmp_path):
    config = begin_with(folders / "hf")
    shutil.copy(folders / "hf" / "tokenizer.json", tmp_path / "copy.json")
    assert find_initial(dataclasses.replace(config, data=DataConfig(tokenizer=str(tmp_path / "copy.json"))))
    (tmp_path / "other.json").write_text("{}")
    for other in ("bytes", str(tmp_path / "other.json")):
        with pytest.raises(ConfigError, match=f"data.tokenizer='{other}': the parameters of init_from=.* other tokens"):
            find_initial(dataclasses.replace(config, data=DataConfig(tokenizer=other)))


@pytest.mark.parametrize("kind", ["hf", "imported"])
def test_find_initial_refuses_bytes_for_a_missing_tokenizer(folders, tmp_path, kind):
    """As of checkpoints that hold tokenizer.model alone; a tokenizer.json that was made from it cannot be compared."""
    write_folder(tmp_path / "hf", LLAMA)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"sentencepiece")
    if kind == "imported":
        import_hf(open_source(tmp_path / "hf"), tmp_path / "imported", ra.make_mesh(sp=8), _quiet)
    config = begin_with(tmp_path / kind, tmp_path / "hf", data=DataConfig())
    with pytest.raises(ConfigError) as caught:
        find_initial(config)
    missing = open_trained_model(config.init_from).config.data.tokenizer
    assert str(caught.value) == (
        f"data.tokenizer='bytes': the parameters of init_from={config.init_from!r} were trained with a tokenizer that "
        f"is not there, {missing}; use --config.data.tokenizer=PATH with the path of its tokenizer.json"
    )
    made = str(folders / "hf" / "tokenizer.json")
    assert find_initial(dataclasses.replace(config, data=DataConfig(tokenizer=made)))


def test_find_initial_refuses_a_folder_without_a_model(folders, tmp_path):
    config = dataclasses.replace(begin_with(folders / "hf"), init_from=str(tmp_path))
    with pytest.raises(ConfigError, match=f"init_from='{tmp_path}': .* has no config.json; give the folder"):
        find_initial(config)


def test_describe_initial_says_what_changes(folders):
    config = begin_with(folders / "hf")
    trained = find_initial(config)
    assert len(describe_initial(config, trained)) == 1
    longer = dataclasses.replace(config, seq_len=256)
    assert "seq_len=256 is beyond the 64 tokens" in describe_initial(longer, trained)[1]
    stretched = of_model(longer, rope=RopeConfig(theta=1e6))
    assert describe_initial(stretched, trained)[1:] == ["model.rope.theta was 10000.0 and is 1000000.0."]
    windowed = dataclasses.replace(config, attention=AttentionConfig(window=9))
    assert describe_initial(windowed, trained)[1:] == ["attention.window was 0 and is 9."]


def test_has_begun_makes_init_from_irrelevant(folders, tmp_path):
    assert has_begun(RunFolder(folders / "run"))
    assert not has_begun(RunFolder(tmp_path))


# --- What a config need not say ---------------------------------------------------------------------------------------

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
STRETCHED = RopeConfig(theta=3e4, scaling="llama3", factor=8.0, original_len=16)
SIZES = dict(vocab_size=48, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=40)


@pytest.fixture(scope="module")
def stretched(tmp_path_factory):
    """A Mistral folder with a scaling, a window, a theta and an epsilon that are no defaults."""
    path = tmp_path_factory.mktemp("stretched") / "hf"
    rope = {"rope_theta": 3e4, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    write_folder(path, MISTRAL | rope | {"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"})
    return path


def config_file(tmp_path, model="", attention=""):
    """A config file with the sizes of the folder, and these arguments."""
    sizes = ", ".join(f"{name}={size}" for name, size in SIZES.items())
    path = tmp_path / "mine.py"
    path.write_text(
        "from ring_attention.models.config import ModelConfig\n"
        "from ring_attention.models.rope import RopeConfig\n"
        "from ring_attention.training.config import AttentionConfig, TrainConfig\n"
        f"def get_config():\n    model = ModelConfig(**dict(dict({sizes}), {model}))\n"
        f"    attention = AttentionConfig({attention})\n"
        "    return TrainConfig(name='mine', model=model, attention=attention, seq_len=64, num_steps=200)\n"
    )
    return path


def parsed(path, *words, begin=None):
    begin = [f"--config.init_from={begin}"] if begin else []
    return parse_config([f"--config={path}", *begin, *words], "configs/tiny.py")


def test_inherit_takes_what_the_config_leaves_out(stretched, tmp_path):
    before = parsed(config_file(tmp_path))
    assert (before.model.rope.scaling, before.attention.window) == ("none", 0)  # the control
    config = parsed(config_file(tmp_path), begin=stretched)
    assert config.model.rope == STRETCHED
    assert (config.attention.window, config.model.norm_epsilon) == (24, 1e-6)
    assert (config.model.compute_dtype, config.seq_len, config.name) == ("float32", 64, "mine")
    same = parsed(config_file(tmp_path, model="rope=RopeConfig(theta=3e4)", attention="window=24"), begin=stretched)
    assert same == config


def test_inherit_refuses_contradictions_with_both_values(stretched, tmp_path):
    rope = "rope=RopeConfig(theta=1e6, scaling='yarn', factor=4.0, original_len=16)"
    path = config_file(tmp_path, model=f"num_layers=2, qk_norm=True, {rope}", attention="window=9, softcap=30.0")
    with pytest.raises(ConfigError) as caught:
        parsed(path, begin=stretched)
    message = str(caught.value)
    for part in (
        "model.num_layers=2 (there 3)",
        "model.qk_norm=True (there False)",
        "model.rope.theta=1000000.0 (there 30000.0)",
        "model.rope.scaling='yarn' (there 'llama3')",
        "model.rope.factor=4.0 (there 8.0)",
        "attention.window=9 (there 24)",
        "attention.softcap=30.0 (there 0.0)",
        f"init_from='{stretched}' holds another model; leave them out",
    ):
        assert part in message
    assert "\n" not in message


def test_inherit_lets_flags_change_scaling_and_window(stretched, tmp_path):
    path = config_file(tmp_path)
    words = ["--config.model.rope.scaling=yarn", "--config.model.rope.factor=4", "--config.model.rope.original_len=64"]
    config = parsed(path, *words, "--config.attention.window=0", begin=stretched)
    assert config.model.rope == RopeConfig(theta=3e4, scaling="yarn", factor=4.0, original_len=64)
    assert config.attention.window == 0
    longer = parsed(path, "--config.model.rope.factor=16", begin=stretched)
    assert longer.model.rope == dataclasses.replace(STRETCHED, factor=16.0)
    bytes_ = dataclasses.replace(config, data=DataConfig(tokenizer="bytes"))
    lines = describe_initial(bytes_, open_trained_model(str(stretched)))
    assert "attention.window was 24 and is 0." in lines
    assert "model.rope.scaling was 'llama3' and is 'yarn'." in lines


def test_inherit_keeps_to_the_run_where_the_model_is_gone(stretched, tmp_path):
    path, gone = config_file(tmp_path), tmp_path / "gone"
    shutil.copytree(stretched, gone)
    words = [f"--config.run_dir={tmp_path / 'run'}"]
    config = parsed(path, *words, begin=gone)
    with open_run_folder(config) as folder:
        (folder.checkpoints / "1").mkdir(parents=True)
    shutil.rmtree(gone)
    assert parsed(path, *words, begin=gone) == config
    with pytest.raises(ConfigError, match="init_from='.*gone': "):  # the control: another run
        parsed(path, begin=gone)


def test_find_initial_refuses_several_fields_at_once(folders):
    config = of_model(begin_with(folders / "hf"), num_layers=4, ffn_dim=48)
    with pytest.raises(ConfigError, match=r"model.num_layers=4, model.ffn_dim=48: .* holds a model with 3, 40; use --"):
        find_initial(config)


def test_config_from_folder_needs_no_weights(stretched, tmp_path):
    (tmp_path / "hf").mkdir()
    shutil.copy(stretched / "config.json", tmp_path / "hf")
    config = parsed(tmp_path / "hf", "--config.seq_len=32")
    want = open_source(stretched).config
    assert config.model == dataclasses.replace(want.model, compute_dtype="bfloat16")
    assert (config.attention.window, config.seq_len, config.name, config.init_from) == (24, 32, "hf", "")
    assert config.data.tokenizer == str(tmp_path / "hf" / "tokenizer.json")
    (tmp_path / "config.json").write_text('{"version": 1}')
    with pytest.raises(ConfigError, match="is a folder without a config.json of Hugging Face; give a config file, or"):
        parsed(tmp_path)
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(ConfigError, match=f"--config={tmp_path / 'hf'}: model_type='gemma': is not implemented"):
        parsed(tmp_path / "hf")
