"""A folder with a Hugging Face checkpoint: opened, and checked, before a tensor is read.

Everything wrong with it is one line, a ConfigError, that names the file and the tensor.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ring_attention.checks import ConfigError, one_line, printable, shown
from ring_attention.models.hf.config import HFConfig, config_from_hf
from ring_attention.models.hf.files import inside, is_regular, read_json, require_regular
from ring_attention.models.hf.header import DTYPES
from ring_attention.models.hf.names import Tensor, embedding_of, is_no_parameter, prefixes_of, tensors_of, tied_copy

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_DOWNLOAD = "download it again"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file: the file's name, the dtype as safetensors names it, and the shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of a tensor whose dtype is one of DTYPES."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that can be read.

    Attributes:
      path: of the folder.
      values: the contents of its config.json.
      config: what they mean.
      files: names of the safetensors files, in order.
      stored: the tensors of all files, by name.
    """

    path: Path
    values: dict[str, Any]
    config: HFConfig
    files: tuple[str, ...]
    stored: dict[str, Stored]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors that become parameters."""
        return sum(self.stored[name].num_bytes for name in expected(self))

    @property
    def tied_copy(self) -> str:
        """The name of a tensor that may stand beside a tied embedding."""
        return tied_copy(prefixes_of(self.config, self.stored))

    @property
    def left_out(self) -> list[str]:
        """Names of the tensors that are no parameters: of rotary frequencies, and of parts that are not text."""
        return [name for name in self.stored if is_no_parameter(name, self.config)]

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Callable[[tuple[slice, ...]], np.ndarray]]:
        """Give read(slices) -> the slice of a tensor, in its own dtype.

        Its file is mapped meanwhile, so that pages which were read are let go of at the end.
        """
        path = self.path / self.stored[name].file
        with _wording(path, name), safe_open(path, framework="numpy") as file:
            tensor = file.get_slice(name)
            yield lambda slices: tensor[slices]


def is_hf_folder(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint rather than one of train.py."""
    with contextlib.suppress(ConfigError):
        return "model_type" in read_json(path / CONFIG)
    return False


def open_source(path: str | Path) -> Source:
    """Open a folder with config.json and model.safetensors, or its shards and their index.

    Raises:
      ConfigError: for a config that is not implemented, files that are missing or damaged, and tensors that are
        missing, unexpected, of another shape or of a dtype that is not read.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise ConfigError(f"{printable(str(path))} is no folder; give the folder of a Hugging Face checkpoint")
    values = read_json(path / CONFIG)
    try:
        config = config_from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{printable(str(path / CONFIG))}: {error}") from error
    places = _places(path)
    files = tuple(sorted(set(places.values()))) if places else (SINGLE,)
    stored: dict[str, Stored] = {}
    for file in files:
        for name, found in _tensors_in(path / file).items():
            if places and places.get(name) != file:
                where = f"{INDEX} places it in {places[name]}" if name in places else f"{INDEX} does not name it"
                raise _wrong(path / file, name, f"is here, but {where}", _DOWNLOAD)
            stored[name] = found
    for name, file in places.items():
        if name not in stored:
            raise _wrong(path / file, name, f"is missing, though {INDEX} places it here", _DOWNLOAD)
    source = Source(path, values, config, files, stored)
    _require_tensors(source, path / (INDEX if places else SINGLE))
    return source


def _places(path: Path) -> dict[str, str]:
    """The file of each tensor as the index says; empty where one file holds them all."""
    index, single = path / INDEX, path / SINGLE
    if not os.path.lexists(index):
        if os.path.lexists(single):
            require_regular(single, _DOWNLOAD)
            return {}
        others = sorted(printable(file.name) for file in path.glob("*.bin"))
        remedy = "save it with save_pretrained of transformers 4.35 or later" if others else _DOWNLOAD
        held = f"; it holds {others[0]}, which can run code and is not read" if others else ""
        raise ConfigError(f"{printable(str(path))} holds neither {SINGLE} nor {INDEX}{held}; {remedy}")
    if os.path.lexists(single):
        raise ConfigError(
            f"{printable(str(path))} holds both {SINGLE} and {INDEX}; take the one away that is not meant"
        )
    places = read_json(index).get("weight_map")
    if not places or not isinstance(places, dict):
        raise ConfigError(
            f"{printable(str(index))}: weight_map={shown(places)}: must give each tensor's file; {_DOWNLOAD}"
        )
    for file in {repr(file): file for file in places.values()}.values():
        if inside(path, file, said_by=f"{index}: weight_map must give each tensor's file").parent != path:
            raise ConfigError(f"{printable(str(index))}: weight_map: {shown(file)} must lie beside it; {_DOWNLOAD}")
    for name, file in places.items():
        if not is_regular(path / file):
            count = list(places.values()).count(file)
            held = f"holds {count} tensors such as {printable(name)}, as {INDEX} says"
            raise ConfigError(f"{printable(str(path / file))} is missing; it {held}; {_DOWNLOAD}")
    return places


def _tensors_in(path: Path) -> dict[str, Stored]:
    """What a file's header says; ConfigError where the file is damaged."""
    with _wording(path), safe_open(path, framework="numpy") as file:
        tensors = {}
        for name in file.keys():  # noqa: SIM118 - it is no dict
            part = file.get_slice(name)
            tensors[name] = Stored(path.name, part.get_dtype(), tuple(part.get_shape()))
        return tensors


def _require_tensors(source: Source, listing: Path) -> None:
    """Raise ConfigError unless the files hold just the tensors that the config asks for; `listing` names them."""
    wanted, copy = expected(source), source.tied_copy
    for name in wanted:
        if name not in source.stored:
            tie = "; tie_word_embeddings=true would do without it" if name == copy else ""
            raise _wrong(listing, name, f"is missing{tie}", _DOWNLOAD)
    for name, stored in source.stored.items():
        if is_no_parameter(name, source.config):
            continue
        tensor = wanted.get(name)
        if tensor is None and name == copy:
            tensor = embedding_of(wanted)
        path = source.path / stored.file
        if tensor is None:
            need = f"is not part of a {source.config.family} model of this config"
            raise _wrong(path, name, need, f"correct {CONFIG}, or take another checkpoint")
        if stored.shape != tensor.shape:
            need = f"has shape {shown(list(stored.shape))}, need {list(tensor.shape)} by {CONFIG}"
            raise _wrong(path, name, need, f"take the {CONFIG} that belongs to the weights")
        if stored.dtype not in DTYPES:
            raise _wrong(path, name, f"has dtype {stored.dtype}, need one of {', '.join(DTYPES)}", "convert it")


def expected(source: Source) -> dict[str, Tensor]:
    """The tensors that become parameters, by name."""
    return tensors_of(source.config, prefixes_of(source.config, source.stored))


def all_finite(array: np.ndarray) -> bool:
    """Whether every number of an array is finite; makes no other array."""
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _wrong(path: Path, name: str, what: str, remedy: str) -> ConfigError:
    return ConfigError(f"{printable(str(path))}: tensor {printable(name)} {what}; {remedy}")


@contextlib.contextmanager
def _wording(path: Path, name: str = "") -> Iterator[None]:
    """Turn what reading a file may raise into one line with the names of the file and the tensor."""
    where = f"{printable(str(path))}{f': tensor {printable(name)}' if name else ''}"
    try:
        yield
    except SafetensorError as error:
        raise ConfigError(f"{where} is damaged or cut short ({one_line(error)}); {_DOWNLOAD}") from error
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror or one_line(error)}); {_DOWNLOAD}") from error
