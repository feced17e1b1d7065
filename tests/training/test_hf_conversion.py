"""From a Hugging Face folder to one of ours and back, by the functions that the scripts call and by the scripts."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from hf_folders import LLAMA, MISTRAL, QWEN3, contents, write_folder

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from ring_attention.models.config import ModelConfig
from ring_attention.models.hf.loading import load_parameters
from ring_attention.models.hf.source import open_source
from ring_attention.models.rope import RopeConfig
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config import AttentionConfig, TrainConfig
from ring_attention.training.fault_tolerance.integrity import sign
from ring_attention.training.hf_conversion import export_config, export_hf, exported_bytes, import_hf
from ring_attention.training.run_folder import open_run_folder
from ring_attention.training.state import make_state
from ring_attention.training.trained_model import open_trained_model

REPOSITORY = Path(__file__).parent.parent.parent
MODEL = ModelConfig(vocab_size=264, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=24)
CONFIG = TrainConfig(name="x", model=MODEL, seq_len=64, num_steps=200)


def _quiet(name, size):
    pass


def _tokenizer(path):
    letters = {chr(ord("a") + i): i for i in range(26)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    made.add_special_tokens(["<s>"])
    made.save(str(path))


def padding_mesh():
    """A mesh that does not divide the width of the model, whose parameters it pads."""
    return ra.make_mesh(sp=3, tp=2, devices=jax.devices()[:6])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face folder at hf/, and its import at imported/."""
    path = tmp_path_factory.mktemp("folders")
    write_folder(path / "hf", MISTRAL, dtype="bfloat16", shards=2)
    _tokenizer(path / "hf" / "tokenizer.json")
    kept = import_hf(open_source(path / "hf"), path / "imported", padding_mesh(), _quiet)
    assert kept.left_out == ()
    return path


def test_import_has_config_and_parameters_of_the_checkpoint(folders):
    trained = open_trained_model(str(folders / "imported"))
    config = trained.config
    assert (config.model, config.attention.window) == (open_source(folders / "hf").config.model, 24)
    assert (config.seq_len, config.name) == (64, "hf")
    assert Path(config.data.tokenizer).is_relative_to(folders / "imported")
    want = load_parameters(open_source(folders / "hf"), ra.make_mesh(sp=8))
    jax.tree.map(np.testing.assert_array_equal, trained.load(ra.make_mesh(sp=4, tp=2)), want)


def test_open_trained_model_takes_a_hugging_face_folder(folders):
    direct, imported = open_trained_model(str(folders / "hf")), open_trained_model(str(folders / "imported"))
    assert Path(direct.config.data.tokenizer) == folders / "hf" / "tokenizer.json"
    data = dataclasses.replace(direct.config.data, tokenizer=imported.config.data.tokenizer)
    assert dataclasses.replace(direct.config, data=data) == imported.config
    assert (direct.manifest, imported.manifest.config) == (None, direct.source.config)
    mesh = ra.make_mesh(sp=8)
    jax.tree.map(np.testing.assert_array_equal, direct.load(mesh, "bfloat16"), imported.load(mesh, "bfloat16"))


def test_open_trained_model_finds_no_manifest_above_the_folder(folders, monkeypatch):
    monkeypatch.chdir(folders)
    assert open_trained_model("hf").manifest is None  # and does not look above it
    assert open_trained_model("imported").manifest is not None


def test_import_that_was_moved_finds_its_tokenizer(folders, tmp_path):
    shutil.copytree(folders / "imported", tmp_path / "moved")
    config = tmp_path / "moved" / "config.json"
    config.write_text(config.read_text().replace(str(folders / "imported"), "/nowhere"))
    tokenizer = open_trained_model(str(tmp_path / "moved")).config.data.tokenizer
    assert Path(tokenizer) == tmp_path / "moved" / "hf" / "files" / "tokenizer.json"


def test_export_of_an_import_gives_the_same_bytes(folders, tmp_path):
    trained = open_trained_model(str(folders / "imported"))
    told = []
    export_hf(trained, tmp_path / "out", padding_mesh(), lambda name, size: told.append(size))
    assert contents(tmp_path / "out") == contents(folders / "hf")
    assert sum(told) == exported_bytes(trained)


def test_export_refuses_an_import_whose_bits_flipped(folders, tmp_path):
    shutil.copytree(folders / "imported", tmp_path / "copy")
    metadata = tmp_path / "copy" / "checkpoints" / "0" / "data" / "metadata"
    values = json.loads(metadata.read_text())
    del values["digest"]
    values["fingerprints"]["params.embed"] += 1
    metadata.write_text(json.dumps(sign(values)))
    with pytest.raises(ConfigError, match="params.embed changed since it was written"):
        open_trained_model(str(tmp_path / "copy")).load(ra.make_mesh(sp=8))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a run's folder with one checkpoint, its parameters)."""
    path = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(CONFIG, run_dir=str(path), attention=AttentionConfig(window=10))
    state = make_state(config, ra.make_mesh(sp=8))
    with open_run_folder(config) as folder, Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(7, state, {})
    return path, state.params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_export_of_a_random_run_has_a_tokenizer(run, tmp_path, dtype):
    path, params = run
    export_hf(open_trained_model(str(path)), tmp_path / "out", ra.make_mesh(sp=8), _quiet, dtype)
    again = open_trained_model(str(tmp_path / "out"))
    assert again.source.config.family == "mistral"
    assert (again.config.model, again.config.attention.window, again.config.seq_len) == (MODEL, 10, 64)
    got = again.load(ra.make_mesh(sp=8))
    if dtype == "bfloat16":
        params = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    exact, text = ByteTokenizer(), "naïve\n\tdef f(x): <s> \U0001f600 ".encode()
    written = HuggingFaceTokenizer(str(tmp_path / "out" / "tokenizer.json"))
    np.testing.assert_array_equal(written.encode(text, special_tokens=False), exact.encode(text))
    assert (written.vocab_size, written.document_start) == (exact.vocab_size, exact.document_start)
    assert written.token_bytes(written.encode(text, special_tokens=False)) == text
    assert again.source.values["bos_token_id"] == 256


def test_export_config_refuses_what_no_family_computes():
    def refused(match, **changes):
        with pytest.raises(ConfigError, match=match):
            export_config(dataclasses.replace(CONFIG, **changes), None)

    assert export_config(CONFIG, None).family == "llama"  # the control
    refused("attention.softcap=3.0: a model of the family", attention=AttentionConfig(softcap=3.0))
    refused("attention.strategy='sparse': is another", attention=AttentionConfig(strategy="sparse"))
    refused(
        "model.qk_norm=True: a model of the family 'qwen2'",
        model=dataclasses.replace(MODEL, qkv_bias=True, qk_norm=True),
    )


def test_export_of_stretched_model_has_new_length_and_scaling(folders):
    before = open_trained_model(str(folders / "imported"))
    rope = RopeConfig(theta=1e4, scaling="yarn", factor=4.0, original_len=64)
    longer = dataclasses.replace(before.config, seq_len=256, model=dataclasses.replace(before.model, rope=rope))
    exported = export_config(longer, before.manifest.values)
    assert (exported.family, exported.max_len, exported.model.rope) == ("mistral", 256, rope)
    dynamic = RopeConfig(theta=1e4, scaling="dynamic", factor=4.0, original_len=64)
    longer = dataclasses.replace(longer, model=dataclasses.replace(before.model, rope=dynamic))
    assert export_config(longer, before.manifest.values).max_len == 64  # which transformers scales from
    shorter = dataclasses.replace(before.config, seq_len=32)
    assert export_config(shorter, before.manifest.values) == before.manifest.config


# --- The scripts ------------------------------------------------------------------------------------------------------


def _script(name, *arguments):
    run = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    return run.returncode, run.stdout, run.stderr


@pytest.mark.slow
def test_import_and_export_commands_show_progress_bytewise(tmp_path):
    write_folder(tmp_path / "hf", QWEN3, dtype="float16", shards=2)
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"the same weights once more")
    status, out, err = _script("import_hf.py", tmp_path / "hf", f"--out={tmp_path / 'imported'}")
    assert (status, err) == (0, "")
    assert "qwen3, 28,712 parameters, 64 tokens of context, 2 files of F16" in out
    assert "Reading" in out
    assert "Left out: pytorch_model.bin" in out
    status, out, err = _script("export_hf.py", tmp_path / "imported", f"--out={tmp_path / 'out'}")
    assert (status, err) == (0, "")
    assert "Writing" in out
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("import_hf.py", "{}/nowhere", "--out={}/out"), "is no folder; give the folder of a Hugging Face checkpoint"),
        (("import_hf.py", "{}/hf", "--out={}/full"), "is there already, and not empty; remove it"),
        (("import_hf.py", "{}/wrong", "--out={}/out"), "hidden_act='relu'"),
        (("import_hf.py", "{}/hf", "--out={}/full/file/out"), "cannot be made"),
        (("export_hf.py", "{}/hf", "--out={}/out"), "is a Hugging Face checkpoint already; copy it"),
        (("export_hf.py", "{}/nowhere", "--out={}/out"), "has no config.json; give the folder of a run"),
    ],
)
def test_import_command_mistake_gives_one_line_and_no_folder(tmp_path, arguments, says):
    write_folder(tmp_path / "hf", LLAMA)
    write_folder(tmp_path / "wrong", LLAMA | {"hidden_act": "relu"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = contents(tmp_path)
    status, _, err = _script(*(argument.format(tmp_path) for argument in arguments))
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert contents(tmp_path) == before


def test_import_that_fails_on_the_way_leaves_nothing(tmp_path):
    tensors = write_folder(tmp_path / "hf", LLAMA)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = np.nan
    shutil.rmtree(tmp_path / "hf")
    write_folder(tmp_path / "hf", LLAMA, tensors=tensors)
    with pytest.raises(ConfigError, match="layers.2.mlp.up_proj.weight holds numbers that are not finite"):
        import_hf(open_source(tmp_path / "hf"), tmp_path / "out", ra.make_mesh(sp=8), _quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
