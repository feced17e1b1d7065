"""Hugging Face folders in and out, on files that the safetensors library wrote."""

import dataclasses
import json
import math
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import LLAMA, MISTRAL, QWEN2, QWEN3, contents, tensors_for, write_folder
from safetensors.numpy import load_file, save_file

import ring_attention as ra
from ring_attention.checks import ConfigError
from ring_attention.models.hf import source as source_module
from ring_attention.models.hf.config import config_from_hf
from ring_attention.models.hf.export import write_again, write_standard
from ring_attention.models.hf.loading import load_parameters
from ring_attention.models.hf.manifest import read_manifest, write_manifest
from ring_attention.models.hf.source import open_source
from ring_attention.models.transformer import parameter_specs

FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
MESHES = {
    "alone": dict(sp=1),
    "sp8": dict(sp=8),
    "fsdp2-tp2": dict(fsdp=2, tp=2),
    "fsdp2-sp2-tp2": dict(fsdp=2, sp=2, tp=2),
    "dp2-sp2-tp2": dict(dp=2, sp=2, tp=2),
}


def _mesh(name):
    return ra.make_mesh(**MESHES[name], devices=jax.devices()[: math.prod(MESHES[name].values())])


WRITTEN_FROM = dict(llama="fsdp2-sp2-tp2", mistral="fsdp2-sp2-tp2", qwen2="fsdp2-tp2", qwen3="fsdp2-tp2")
"""Meshes from which models are written: a program takes a layer of each shape from each device."""


def _quiet(name, size):
    pass


def _by_hand(values, tensors):
    """The parameters, element by element as the brief of the tree has it: no reshaping that the table does too."""
    H, K = values["num_attention_heads"], values["num_key_value_heads"]
    D = values.get("head_dim", values["hidden_size"] // H)

    def layers(name, convert):
        return np.stack([convert(tensors[f"model.layers.{i}.{name}"]) for i in range(values["num_hidden_layers"])])

    def heads(n):
        return lambda w: np.stack([w[h * D : (h + 1) * D].T for h in range(n)], axis=1)  # [M,n,D]

    attention = {
        "query": layers("self_attn.q_proj.weight", heads(H)),
        "key": layers("self_attn.k_proj.weight", heads(K)),
        "value": layers("self_attn.v_proj.weight", heads(K)),
        "out": layers("self_attn.o_proj.weight", lambda w: np.stack([w[:, h * D : (h + 1) * D].T for h in range(H)])),
    }
    if values["model_type"] == "qwen2":
        for ours, theirs, n in (("query", "q", H), ("key", "k", K), ("value", "v", K)):
            bias = layers(
                f"self_attn.{theirs}_proj.bias", lambda b, n=n: np.stack([b[h * D : (h + 1) * D] for h in range(n)])
            )
            attention[f"{ours}_bias"] = bias
    if values["model_type"] == "qwen3":
        attention["query_norm"] = {"scale": layers("self_attn.q_norm.weight", np.array)}
        attention["key_norm"] = {"scale": layers("self_attn.k_norm.weight", np.array)}
    tree = {
        "embed": tensors["model.embed_tokens.weight"],
        "norm": {"scale": tensors["model.norm.weight"]},
        "layers": {
            "attention": attention,
            "attention_norm": {"scale": layers("input_layernorm.weight", np.array)},
            "feedforward_norm": {"scale": layers("post_attention_layernorm.weight", np.array)},
            "feedforward": {
                "gate": layers("mlp.gate_proj.weight", np.transpose),
                "up": layers("mlp.up_proj.weight", np.transpose),
                "down": layers("mlp.down_proj.weight", np.transpose),
            },
        },
    }
    if "lm_head.weight" in tensors:
        tree["unembed"] = tensors["lm_head.weight"].T
    return tree


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        *((family, "fsdp2-sp2-tp2") for family in FAMILIES),
        *(("qwen2", mesh) for mesh in MESHES if mesh != "fsdp2-sp2-tp2"),
    ],
)
def test_every_number_lands_where_the_model_wants_it_on_any_mesh(tmp_path, family, mesh):
    values = FAMILIES[family]
    tensors = write_folder(tmp_path / "hf", values, shards=2)
    source = open_source(tmp_path / "hf")
    params = load_parameters(source, _mesh(mesh))
    want = _by_hand(values, tensors)
    assert jax.tree.structure(params) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    specs = parameter_specs(source.config.transformer)
    jax.tree.map(lambda x, spec: np.testing.assert_equal(x.sharding.spec, spec), params, specs)
    assert not np.array_equal(
        params["layers"]["attention"]["query"], want["layers"]["attention"]["query"][::-1]
    )  # the control


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_numbers_are_those_of_the_files_in_the_dtype_that_is_asked_for(tmp_path, stored, wanted):
    tensors = write_folder(tmp_path / "hf", LLAMA, dtype=stored)
    params = load_parameters(open_source(tmp_path / "hf"), _mesh("sp8"), wanted)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    expected = jnp.asarray(tensors["model.embed_tokens.weight"]).astype(wanted)
    np.testing.assert_array_equal(params["embed"], expected)


def test_a_process_reads_no_more_than_its_devices_hold(tmp_path, monkeypatch):
    tensors = write_folder(tmp_path / "hf", LLAMA)
    read = []
    original = source_module.Source.reading

    def counting(self, name):
        context = original(self, name)

        class Reading:
            def __enter__(self):
                inner = context.__enter__()

                def reader(slices):
                    part = inner(slices)
                    read.append(part.size)
                    return part

                return reader

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Reading()

    monkeypatch.setattr(source_module.Source, "reading", counting)
    total = sum(tensor.size for tensor in tensors.values())
    for mesh, replicated in (("sp8", 1), ("dp2-sp2-tp2", 1)):  # replicas on dp are read once
        read.clear()
        load_parameters(open_source(tmp_path / "hf"), _mesh(mesh))
        assert sum(read) == total * replicated


# --- Written again ----------------------------------------------------------------------------------------------------


def _import_and_write(folder, tmp_path, change=lambda params: params, config=None, mesh="alone"):
    source = open_source(folder)
    params = load_parameters(source, _mesh(mesh))
    kept = write_manifest(source, tmp_path / "kept")
    (tmp_path / "out").mkdir()
    write_again(read_manifest(tmp_path / "kept"), change(params), config or source.config, tmp_path / "out", _quiet)
    return kept


@pytest.mark.parametrize(
    ("family", "dtype", "shards"),
    [
        (family, dtype, (1, 3)[(i + j) % 2])
        for i, family in enumerate(FAMILIES)
        for j, dtype in enumerate(["bfloat16", "float16", "float32"])
    ],
)
def test_what_was_imported_is_exported_byte_for_byte(tmp_path, family, dtype, shards):
    write_folder(tmp_path / "hf", FAMILIES[family], dtype=dtype, shards=shards)
    _import_and_write(tmp_path / "hf", tmp_path, mesh=WRITTEN_FROM[family])
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")
    assert len(contents(tmp_path / "out")) == 5 + (shards > 1) * shards


def test_extreme_numbers_come_back_byte_for_byte(tmp_path):
    tensors = tensors_for(LLAMA)
    tensors["model.norm.weight"][:6] = [0.0, -0.0, 6e-8, -6e-8, 65504.0, 1.4e-45]
    write_folder(tmp_path / "hf", LLAMA, dtype="float16", tensors=tensors)
    _import_and_write(tmp_path / "hf", tmp_path)
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")


def test_tensors_that_are_no_parameters_and_a_tied_copy_come_back_byte_for_byte(tmp_path):
    tensors = tensors_for(QWEN2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for i in range(3):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.float32([1.0, 0.1, 0.01, 0.001])
    write_folder(tmp_path / "hf", QWEN2, dtype="bfloat16", shards=2, tensors=tensors)
    (tmp_path / "hf" / "original").mkdir()
    (tmp_path / "hf" / "original" / "params.json").write_text("{}")
    (tmp_path / "hf" / "original" / "consolidated.00.pth").write_bytes(b"the weights once more")
    (tmp_path / "hf" / ".git").mkdir()
    (tmp_path / "hf" / ".git" / "config").write_text("")
    kept = _import_and_write(tmp_path / "hf", tmp_path)
    assert kept.left_out == ("original/consolidated.00.pth",)
    expected = contents(tmp_path / "hf")
    del expected["original/consolidated.00.pth"], expected[".git/config"]
    assert contents(tmp_path / "out") == expected


def test_new_values_change_the_tensors_alone(tmp_path):
    tensors = write_folder(tmp_path / "hf", LLAMA, dtype="bfloat16", shards=2)
    _import_and_write(tmp_path / "hf", tmp_path, change=lambda params: jax.tree.map(lambda x: x * 2, params))
    before, after = contents(tmp_path / "hf"), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {name for name in before if "-of-" in name}
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        for tensor, values in load_file(tmp_path / "out" / name).items():
            np.testing.assert_array_equal(values, tensors[tensor] * 2)


def test_a_stretched_model_has_another_config_and_all_other_bytes(tmp_path):
    write_folder(tmp_path / "hf", LLAMA | {"rope_theta": 1e4, "torch_dtype": "bfloat16"}, dtype="bfloat16")
    before = config_from_hf(LLAMA | {"rope_theta": 1e4})
    rope = dataclasses.replace(before.model.rope, theta=1e6)
    after = dataclasses.replace(before, model=dataclasses.replace(before.model, rope=rope), max_len=4096)
    _import_and_write(tmp_path / "hf", tmp_path, config=after)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config_from_hf(written) == after
    assert written["torch_dtype"] == "bfloat16"
    differing = {n for n, data in contents(tmp_path / "hf").items() if contents(tmp_path / "out")[n] != data}
    assert differing == {"config.json"}


def test_values_that_a_file_cannot_hold_are_refused_by_name(tmp_path):
    write_folder(tmp_path / "hf", LLAMA, dtype="float16")
    with pytest.raises(ConfigError, match=r"tensor .* does not fit float16: its largest value is"):
        _import_and_write(tmp_path / "hf", tmp_path, change=lambda params: jax.tree.map(lambda x: x * 1e6, params))


@pytest.mark.parametrize("name", ["files/config.json", "headers/model.safetensors", "files/LICENSE"])
def test_what_was_kept_is_checked_before_it_is_used(tmp_path, name):
    write_folder(tmp_path / "hf", LLAMA)
    write_manifest(open_source(tmp_path / "hf"), tmp_path / "kept")
    read_manifest(tmp_path / "kept")
    path = tmp_path / "kept" / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ConfigError, match=f"{name} is not as it was written; import"):
        read_manifest(tmp_path / "kept")


# --- From nothing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("most", [10**9, 20_000])
def test_the_standard_layout_is_read_back_to_the_same_model(tmp_path, family, most):
    write_folder(tmp_path / "hf", FAMILIES[family])
    source = open_source(tmp_path / "hf")
    params = load_parameters(source, _mesh(WRITTEN_FROM[family]))
    (tmp_path / "out").mkdir()
    write_standard(params, source.config, "float32", tmp_path / "out", _quiet, extra={"bos_token_id": 3}, most=most)
    again = open_source(tmp_path / "out")
    assert again.config == source.config
    assert again.values["bos_token_id"] == 3
    jax.tree.map(np.testing.assert_array_equal, load_parameters(again, _mesh("sp8")), params)
    sizes = [(tmp_path / "out" / name).stat().st_size for name in again.files]
    assert (len(sizes) == 1) == (most == 10**9)
    assert max(sizes) < most + 4096  # the header's bytes are not counted
    largest = max(np.prod(stored.shape) * 4 for stored in again.stored.values())
    assert largest < most  # the control: no single tensor decides the size of a file


def test_the_library_reads_what_is_written(tmp_path):
    tensors = write_folder(tmp_path / "hf", LLAMA)
    source = open_source(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    params = load_parameters(source, _mesh("alone"))
    write_standard(params, source.config, "bfloat16", tmp_path / "out", _quiet, extra={})
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], jnp.asarray(tensor).astype(jnp.bfloat16))


# --- What can be wrong with a folder ----------------------------------------------------------------------------------


def _edit(file, change):
    """Rewrite a safetensors file with other tensors."""

    def do(path):
        tensors = load_file(path / file)
        change(tensors)
        save_file(tensors, path / file, metadata={"format": "pt"})

    return do


def _cut_file(file, size):
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:size])


def _index(change):
    def do(path):
        values = json.loads((path / "model.safetensors.index.json").read_text())
        change(values["weight_map"])
        (path / "model.safetensors.index.json").write_text(json.dumps(values))

    return do


def _config(**changes):
    return lambda path: (path / "config.json").write_text(json.dumps(LLAMA | changes))


def _header_bytes(data):
    return lambda path: (path / FIRST).write_bytes(struct.pack("<Q", len(data)) + data)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
NAN, INFINITE = np.full((2, 32), [[np.nan], [np.inf]], np.float32)

WRONG = {
    "no folder": (lambda path: shutil.rmtree(path), ["is no folder", "give the folder"]),
    "no config": (lambda path: (path / "config.json").unlink(), ["config.json", "cannot be read"]),
    "config is cut": (_cut_file("config.json", 40), ["config.json", "not JSON", "again"]),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), ["config.json", "need an object"]),
    "config is refused": (_config(hidden_act="gelu"), ["config.json", "hidden_act='gelu'"]),
    "config of another model": (_config(intermediate_size=41), ["gate_proj", "shape [40, 32]", "need [41, 32]"]),
    "one layer more": (_config(num_hidden_layers=4), ["index.json", "model.layers.3", "is missing"]),
    "one layer less": (_config(num_hidden_layers=2), ["model.layers.2", "is not part of a llama model"]),
    "no files": (
        lambda path: [file.unlink() for file in path.glob("*.safetensors*")],
        ["holds neither model.safetensors nor model.safetensors.index.json"],
    ),
    "pickles": (
        lambda path: [file.rename(file.with_suffix(".bin")) for file in path.glob("*.safetensors*")],
        ["model-00001-of-00002.bin", "can run code", "save_pretrained"],
    ),
    "both layouts": (
        lambda path: shutil.copy(path / FIRST, path / "model.safetensors"),
        ["holds both", "take the one away"],
    ),
    "missing shard": (lambda path: (path / SECOND).unlink(), [SECOND, "is missing", "such as model"]),
    "shard cut": (_cut_file(SECOND, 3000), [SECOND, "damaged or cut short"]),
    "shard cut by a byte": (_cut_file(FIRST, -1), [FIRST, "damaged or cut short"]),
    "empty shard": (_cut_file(FIRST, 0), [FIRST, "damaged or cut short"]),
    "header is no JSON": (_header_bytes(b"{no json}"), [FIRST, "damaged or cut short"]),
    "a page of HTML": (lambda path: (path / FIRST).write_text("<html>" * 99), [FIRST, "damaged or cut short"]),
    "index is no map": (
        lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        ["index.json", "weight_map=[1]"],
    ),
    "index leads elsewhere": (
        _index(lambda places: places.update({NORM: "../" + FIRST})),
        ["index.json", "must give each tensor's file"],
    ),
    "index names one too many": (
        _index(lambda places: places.update({"model.more": FIRST})),
        [FIRST, "model.more", "is missing, though"],
    ),
    "index forgets one": (_index(lambda places: places.pop(EMBED)), [SECOND, EMBED, "does not name it"]),
    "missing tensor": (_edit(SECOND, lambda tensors: tensors.pop(EMBED)), [SECOND, EMBED, "is missing"]),
    "unexpected tensor": (
        lambda path: [
            _edit(FIRST, lambda tensors: tensors.update({"model.more": NAN}))(path),
            _index(lambda places: places.update({"model.more": FIRST}))(path),
        ],
        [FIRST, "model.more", "is not part of a llama model"],
    ),
    "wrong shape": (
        _edit(SECOND, lambda tensors: tensors.update({EMBED: tensors[EMBED].T.copy()})),
        [SECOND, EMBED, "shape [32, 48], need [48, 32]"],
    ),
    "integers": (
        _edit(SECOND, lambda tensors: tensors.update({EMBED: tensors[EMBED].astype(np.int8)})),
        [SECOND, EMBED, "dtype I8", "F32, BF16, F16"],
    ),
    "not a number": (
        lambda path: [_edit(f, lambda t: NORM in t and t.update({NORM: NAN}))(path) for f in (FIRST, SECOND)],
        [NORM, "not finite"],
    ),
    "infinite": (
        lambda path: [_edit(f, lambda t: NORM in t and t.update({NORM: INFINITE}))(path) for f in (FIRST, SECOND)],
        [NORM, "not finite"],
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line_with_file_and_tensor(tmp_path, what):
    break_it, says = WRONG[what]
    folder = tmp_path / "hf"
    write_folder(folder, LLAMA, shards=2)
    load_parameters(open_source(folder), _mesh("alone"))  # the control
    break_it(folder)
    with pytest.raises(ConfigError) as caught:
        load_parameters(open_source(folder), _mesh("alone"))
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    assert all(part in message for part in says), message


def test_an_embedding_that_is_tied_must_equal_its_copy(tmp_path):
    tensors = tensors_for(QWEN2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][47, 31] += 1
    write_folder(tmp_path / "hf", QWEN2, tensors=tensors)
    with pytest.raises(ConfigError, match=r"lm_head.weight is not model.embed_tokens.weight, though tie_word"):
        load_parameters(open_source(tmp_path / "hf"), _mesh("alone"))


def test_a_mesh_that_does_not_divide_the_model_is_refused_before_a_tensor_is_read(tmp_path):
    write_folder(tmp_path / "hf", LLAMA)
    with pytest.raises(ConfigError, match="num_key_value_heads=2 is not divisible by tp=4"):
        load_parameters(open_source(tmp_path / "hf"), ra.make_mesh(sp=2, tp=4))
