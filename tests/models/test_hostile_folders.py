"""Folders from strangers cost one line: whatever is changed of them, nothing raises more, waits, or writes elsewhere.

HOSTILE_FOLDERS=200 pytest tests/models/test_hostile_folders.py tries so many of each kind, and imports and exports
those that can be opened to the end; HOSTILE_SEED=7 tries others.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import traceback
from pathlib import Path

import jax
import pytest
import tokenizers
from hf_folders import LLAMA, QWEN2, write_folder
from hostile import (
    add_beside,
    any_of,
    copy,
    mutate_bytes,
    mutate_header,
    mutate_json,
    mutate_kind,
    mutate_length,
    sign_again,
)

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.data.tokenizers import load_tokenizer
from ring_attention.inference.ends import end_tokens
from ring_attention.models.hf.export import write_again
from ring_attention.models.hf.files import inside
from ring_attention.models.hf.loading import load_parameters
from ring_attention.models.hf.manifest import read_manifest, write_manifest
from ring_attention.models.hf.source import open_source
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.hf_conversion import export_config, export_hf, import_hf, new_folder
from ring_attention.training.trained_model import open_trained_model

SEED, COUNT = int(os.environ.get("HOSTILE_SEED", "0")), int(os.environ.get("HOSTILE_FOLDERS", "0"))
MOST_SECONDS = 10
SMALL = dict(num_hidden_layers=1, vocab_size=48)


def _quiet(name, size):
    pass


def _mesh():
    return ra.make_mesh(sp=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """sharded/ and single/, checkpoints of Hugging Face; imported/, the first one's import."""
    path = tmp_path_factory.mktemp("folders")
    write_folder(path / "sharded", LLAMA | SMALL | {"rope_scaling": {"type": "linear", "factor": 2.0}}, shards=2)
    qwen = {"rope_theta": 1e4, "sliding_window": 9, "use_sliding_window": False}
    write_folder(path / "single", QWEN2 | SMALL | qwen)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[]))
    made.add_special_tokens(["<s>"])
    made.decoder = tokenizers.decoders.ByteLevel()
    for name in ("sharded", "single"):
        made.save(str(path / name / "tokenizer.json"))
    import_hf(open_source(path / "sharded"), path / "imported", _mesh(), _quiet)
    return path


def import_folder(folder, out, params):
    """What import_hf.py does but for the checkpoint of ours, which orbax writes."""
    trained = open_trained_model(str(folder))
    source = trained.source or open_source(folder)
    assert source.tensor_bytes > 0
    with contextlib.suppress(ConfigError):  # a checkpoint without a tokenizer can be imported
        end_tokens(trained, load_tokenizer(trained.config.data.tokenizer))
    if COUNT:
        import_hf(source, out, _mesh(), _quiet)
    else:
        load_parameters(source, _mesh())
        write_manifest(source, out)


def export_folder(folder, out, params):
    """What export_hf.py does but for reading the checkpoint of ours."""
    trained = open_trained_model(str(folder))
    if COUNT:
        export_hf(trained, out, _mesh(), _quiet)
        return
    config = export_config(trained.config, trained.manifest.values)
    with new_folder(out, 0, "--out") as partial:
        write_again(trained.manifest, params, config, partial, _quiet)


def load_run(folder, out, params):
    """What every program does with a run's folder."""
    trained = open_trained_model(str(folder))
    trained.load(_mesh())
    load_tokenizer(trained.config.data.tokenizer)
    export_folder(folder, out, params)


QUICK = {import_folder: 40, export_folder: 60, load_run: 20}
"""Folders of each kind without HOSTILE_FOLDERS."""

CHECKPOINT = [
    ("*.json", mutate_json),
    ("*.json", mutate_bytes),
    ("*.safetensors", mutate_header),
    ("*.safetensors", mutate_length),
    ("*.safetensors", mutate_bytes),
    ("*", mutate_kind),
    ("config.json", add_beside),
]
MANIFEST = [
    ("hf/manifest.json", mutate_json),
    ("hf/files/config.json", mutate_json),
    ("hf/headers/*", mutate_header),
    ("hf/headers/*", mutate_length),
    ("hf/**/*", mutate_bytes),
    ("hf/**/*", mutate_kind),
]
RUN = [
    ("config.json", mutate_json),
    ("config.json", mutate_bytes),
    ("checkpoints/0/**/_METADATA", mutate_json),
    ("checkpoints/0/data/metadata", mutate_json),
    ("checkpoints/0/files.json", mutate_json),
    ("checkpoints/0/_CHECKPOINT_METADATA", mutate_bytes),  # on this and the next nothing depends
    ("config.json", add_beside),
    ("config.json", add_beside),
    ("checkpoints/0/**/*metadata*", mutate_bytes),
    ("checkpoints/0/**/*", mutate_bytes),
    ("**/*", mutate_kind),
]
KINDS = {
    "a sharded checkpoint": ("sharded", CHECKPOINT, import_folder),
    "a checkpoint in one file": ("single", CHECKPOINT, import_folder),
    "what an import kept": ("imported", MANIFEST, export_folder),
    "a run": ("imported", RUN, load_run),
}


@contextlib.contextmanager
def no_longer_than(seconds):
    def stop(number, frame):
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(call, folder, out, params):
    """ "", or what is wrong with how `call` ended."""
    try:
        with no_longer_than(MOST_SECONDS):
            call(folder, out, params)
    except (ConfigError, RunError) as error:
        text = str(error)
        return "" if text and len(text.splitlines()) == 1 else f"more than a line: {text!r:.300}"
    except BaseException as error:  # noqa: BLE001 - of Rust's panics, too
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        return f"{type(error).__name__}: {error!s:.200} at {[f'{f.filename[-40:]}:{f.lineno}' for f in frames]}"
    return ""


def listing(folder, without):
    """Every path below `folder`, and how large it is, but for what lies in the folders `without`."""
    found = {}
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(path, name) not in without]
        found |= {os.path.join(path, name): os.lstat(os.path.join(path, name)).st_size for name in names + folders}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_stranger_changed_costs_one_line_and_writes_nowhere_else(folders, tmp_path, kind):
    name, mutations, call = KINDS[kind]
    wrong, refused, count = [], 0, COUNT or QUICK[call]
    params = load_parameters(open_source(folders / "sharded"), _mesh())
    for number in range(count):
        seed = f"{SEED}-{kind}-{number}"
        rng, place = random.Random(seed), tmp_path / "deep" / "down"
        place.mkdir(parents=True)
        folder, out = copy(folders / name, place / "folder"), place / "out"
        done = [any_of(rng, folder, mutations) for _ in range(rng.choice([1, 1, 2]))]
        sign_again(folder / "hf")
        before = listing(tmp_path, without=())
        problem = attempt(call, folder, out, params)
        refused += not out.is_dir()
        after = listing(tmp_path, without={out})
        if after.keys() - {str(out)} != before.keys():
            problem += f" wrote or took away {sorted(after.keys() ^ before.keys())[:3]}"
        wrong += [f"seed {seed!r}: {done}: {problem}"] if problem else []
        shutil.rmtree(tmp_path / "deep")
    print(f"{kind}: {count} folders from seed {SEED}, {refused} refused, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)
    assert 0 < refused < count  # the control: some changes matter, and some do not


@pytest.mark.parametrize("key", ["others", "shards"])
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/../../../x", "..", "", "./x", "a//x", "a" * 300, "\0", 7])
def test_an_import_whose_manifest_names_what_is_not_below_it_is_refused(folders, tmp_path, key, name):
    kept = copy(folders / "imported" / "hf", tmp_path / "a" / "b" / "hf")
    assert read_manifest(kept).others  # the control
    values = json.loads((kept / "manifest.json").read_text())
    values[key].append(name)
    (kept / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="manifest.json: .* must name a file below its folder; take the folder from"):
        read_manifest(kept)


@pytest.mark.parametrize("name", ["x", "a/b.json", "a b", "é", "...", "..x"])
def test_names_below_a_folder_are_taken(tmp_path, name):
    assert inside(tmp_path, name, said_by=tmp_path) == tmp_path / name


@pytest.mark.parametrize("other", ["pipe", "broken link", "folder link"])
def test_what_lies_beside_a_checkpoint_and_is_no_file_is_left_out_and_named(folders, tmp_path, other):
    folder = copy(folders / "single", tmp_path / "hf")
    match other:
        case "pipe":
            os.mkfifo(folder / "extra")
        case "broken link":
            (folder / "extra").symlink_to("nowhere")
        case "folder link":
            (folder / "extra").symlink_to(".")
    kept = write_manifest(open_source(folder), tmp_path / "kept")
    assert kept.left_out == ("extra",)
    assert "tokenizer.json" in kept.others
