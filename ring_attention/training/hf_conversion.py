"""Hugging Face checkpoints from and to the folders that train.py writes and reads."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from jax.sharding import Mesh

from ring_attention.checks import ConfigError, require_choice, require_field, require_local
from ring_attention.data.tokenizers import BYTES, byte_level_letters, load_tokenizer
from ring_attention.models.hf.config import HFConfig, config_from_hf, family_for, update_hf
from ring_attention.models.hf.export import DTYPE_NAMES, numpy_dtype, write_again, write_standard
from ring_attention.models.hf.loading import Progress, load_parameters
from ring_attention.models.hf.manifest import FILES, FOLDER, TOKENIZER, Manifest, write_manifest
from ring_attention.models.hf.names import tensors_of
from ring_attention.models.hf.source import Source
from ring_attention.models.layer_kinds import LayerKind
from ring_attention.models.transformer import abstract_parameters, resized_parameters
from ring_attention.parallel.strategies import STRATEGIES
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config import TrainConfig
from ring_attention.training.fault_tolerance.errors import RunError
from ring_attention.training.run_folder import RunFolder, write_config
from ring_attention.training.trained_model import TrainedModel, config_of

NEW_DTYPE = "float32"
"""Dtype of an exported checkpoint where none is asked for: the values stay as they are."""

_ROOM = 2**20  # for the small files


def require_new(path: Path, flag: str) -> None:
    """Raise ConfigError unless `path`, which `flag` names, does not exist or is an empty folder."""
    require_local(flag, path)
    held = path.exists() and (not path.is_dir() or any(path.iterdir()))
    require_field(not held, flag, str(path), "is there already, and not empty", "remove it, or give another folder")


@contextlib.contextmanager
def new_folder(path: Path, num_bytes: int, flag: str) -> Iterator[Path]:
    """Give a folder to write into, which becomes `path` at the end; whatever ends the block before leaves nothing.

    Args:
      path: a folder that does not exist, or is empty.
      num_bytes: how much will be written; the disk must have room for it.
      flag: the name of the flag that `path` came from, for messages.

    Raises:
      ConfigError: if `path` cannot be made, holds something, or its disk has no room.
      RunError: if the disk refuses while it is written.
    """
    require_local(flag, path)
    path = path.absolute()
    try:
        require_new(path, flag)
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        raise ConfigError(f"{flag}={str(path)!r}: cannot be made ({error.strerror}); give another folder") from error
    try:
        need = f"its disk has {free / 2**20:,.0f} MiB free, need {num_bytes / 2**20:,.0f} MiB"
        require_field(free >= num_bytes, flag, str(path), need, "make room, or give a folder on another disk")
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error.strerror}); make room or mend it, and start again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def import_hf(source: Source, out: Path, mesh: Mesh, progress: Progress) -> Manifest:
    """Write the folder `out`: config.json, a checkpoint of the parameters with fingerprints, and `hf/`.

    Args:
      source: what `open_source` returned.
      out: a folder that does not exist, or is empty.
      mesh: its devices hold the parameters meanwhile.
      progress: called for each tensor.

    Raises:
      ConfigError: if the checkpoint is damaged, or `out` cannot be made.
      RunError: if the disk refuses.
    """
    with new_folder(out, 4 * source.config.transformer.num_parameters, "--out") as partial:
        manifest = write_manifest(source, partial / FOLDER)
        params = load_parameters(source, mesh, progress=progress)
        folder = RunFolder(partial)
        whole = {"params": abstract_parameters(source.config.transformer)}
        with Checkpoints(folder.checkpoints, whole) as checkpoints:
            checkpoints.save(0, {"params": params}, {})
        config = config_of(source.path, source.config)
        data = dataclasses.replace(config.data, tokenizer=str(out.absolute() / FOLDER / FILES / TOKENIZER))
        write_config(folder, dataclasses.replace(config, data=data))
    return manifest


def export_config(config: TrainConfig, values: Mapping[str, Any] | None) -> HFConfig:
    """Return what config.json will say of a model that came from a checkpoint with the config.json `values`, if any.

    Raises:
      ConfigError: naming the field, if no family of Hugging Face computes what the model does.
    """
    attention = config.attention
    other = "is another function than the models of Hugging Face have"
    for name in ("strategy", "local_strategy"):
        value = getattr(attention, name)
        exact = not value or STRATEGIES[value].exact
        require_field(exact, f"attention.{name}", value, other, f"train with attention.{name}=ring")
    require_field(not attention.alibi, "attention.alibi", attention.alibi, other, "train without it")
    before = config_from_hf(values) if values else None
    rope = config.model.rope
    max_len = rope.original_len if rope.scaling == "dynamic" else max(config.seq_len, before.max_len if before else 0)
    given = LayerKind(**{name: getattr(attention, name) for name in ("window", "chunk", "sinks", "softcap")})
    if before is None:
        exported = HFConfig(
            family=family_for(config.model, given, max_len), model=config.model, attention=given, max_len=max_len
        )
    else:
        exported = dataclasses.replace(before, model=config.model, attention=given, max_len=max_len)
    same = before is None or _shapes(before) == _shapes(exported)
    theirs = "the checkpoint that it came from has tensors of other shapes"
    require_field(same, "parameters", config.model.num_parameters, theirs, "take the folder as train.py wrote it")
    if values:
        update_hf(values, exported)  # raises for what the family cannot say
    return exported


def _shapes(config: HFConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that this model has in a Hugging Face checkpoint, by name."""
    return {name: tensor.shape for name, tensor in tensors_of(config).items()}


def export_hf(trained: TrainedModel, out: Path, mesh: Mesh, progress: Progress, dtype: str | None = None) -> None:
    """Write `trained` to the folder `out`.

    A model that came from a Hugging Face checkpoint becomes one with the same files, names, order and dtypes; where
    nothing was trained, the bytes are the same too. Another becomes a checkpoint of its own, with a tokenizer.

    Args:
      trained: the model of an import or a run, opened by one process.
      out: a folder that does not exist, or is empty.
      mesh: its devices hold the parameters meanwhile.
      progress: called for each tensor.
      dtype: the dtype of the files, a key of DTYPE_NAMES; None takes that of the checkpoint that the model came from.

    Raises:
      ConfigError: for what cannot be expressed, or a folder that cannot be made.
      RunError: if the disk refuses.
    """
    if trained.source is not None:
        raise ConfigError(f"{trained.checkpoint} is a Hugging Face checkpoint already; copy it")
    manifest = trained.manifest
    config = export_config(trained.config, manifest and manifest.values)
    require_field(
        dtype is None or not manifest,
        "--dtype",
        dtype,
        "the files keep the dtypes of the checkpoint that the model came from",
        "leave it out",
    )
    if dtype is not None:
        require_choice("--dtype", dtype, DTYPE_NAMES)
    with new_folder(out, exported_bytes(trained, dtype) + _ROOM, "--out") as partial:
        params = resized_parameters(trained.load(mesh), trained.config.transformer)
        if manifest:
            write_again(manifest, params, config, partial, progress)
        else:
            tokens = write_tokenizer(trained.config, partial)
            write_standard(params, config, dtype or NEW_DTYPE, partial, progress, extra=tokens)


def exported_bytes(trained: TrainedModel, dtype: str | None = None) -> int:
    """Return the bytes of the tensors that `export_hf` writes."""
    if trained.manifest:
        return trained.manifest.tensor_bytes
    return numpy_dtype(dtype or NEW_DTYPE).itemsize * trained.config.transformer.num_parameters


def write_tokenizer(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Write tokenizer.json and what transformers needs beside it; return what config.json says of its tokens."""
    spec = config.data.tokenizer
    tokenizer = load_tokenizer(spec)
    start, end = tokenizer.document_start, tokenizer.document_end
    if spec == BYTES:
        _byte_tokenizer(start).save(str(out / TOKENIZER))
    else:
        shutil.copyfile(spec, out / TOKENIZER)
    written = tokenizers.Tokenizer.from_file(str(out / TOKENIZER))
    names = {"bos_token": written.id_to_token(start), "eos_token": written.id_to_token(end)}
    special = {field: name for field, name in names.items() if name}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.seq_len} | special
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return {"bos_token_id": start, "eos_token_id": end}


def _byte_tokenizer(start: int) -> tokenizers.Tokenizer:
    """Make a tokenizer whose ids are those of `ByteTokenizer`: a token is a byte."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_level_letters(), merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken("<s>", special=True)])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return made
