"""Which tokens open and end a text: what a Hugging Face tokenizer.json and the files beside it say."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import tokenizers

from ring_attention.checks import ConfigError, is_whole, printable, shown

MOST_TOKENS = 2**24
"""Largest vocabulary that is accepted, sixty times the largest in use: a table of it is held in memory."""

START_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[BOS]")
"""What tokens that separate documents are mostly called, asked last."""

_NAMES, _IDS = ("tokenizer_config.json", "special_tokens_map.json"), ("config.json", "generation_config.json")
_COPY = "copy it again, or take it away"


@dataclasses.dataclass(frozen=True)
class Borders:
    """Ids of the tokens around a text.

    Attributes:
      fed: ids that `transformers` puts before a text (`add_special_tokens=True`); often one, none for Qwen and GPT-2.
      start: the id that a packed document opens with; None if nothing names one.
      end: the id that a packed document ends with; None if nothing names one.
    """

    fed: tuple[int, ...]
    start: int | None
    end: int | None


def find_borders(tokenizer: tokenizers.Tokenizer, path: str) -> Borders:
    """Find the tokens around a text for the tokenizer of the file `path`.

    What is fed is the post-processor's alone, as in transformers 5, which reads `add_bos_token` only where there is no
    tokenizer.json. The start is the first of these, or else `bos_token` of tokenizer_config.json, `bos_token_id` of
    config.json, a special token with one of START_NAMES, the end. The end is `eos_token`, `eos_token_id` (the first, if
    it is a list), or what the post-processor puts after a text.

    Raises:
      ConfigError: if one of the files is no JSON, or names no tokens.
    """
    before, after = _around_a_text(tokenizer, path)
    folder = Path(path).parent
    files = {name: _read(folder / name) for name in (*_NAMES, *_IDS)}
    end = next(iter([*_named(tokenizer, folder, files, "eos"), *after]), None)
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    by_name = [special[name] for name in START_NAMES if name in special]
    starts = [*before, *_named(tokenizer, folder, files, "bos"), *by_name, end]
    return Borders(tuple(before), starts[0], end)


def _around_a_text(tokenizer: tokenizers.Tokenizer, path: str) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor puts before and after a text, whatever the text."""
    if tokenizer.post_processor is None:
        return [], []
    probe = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, "x"))
    probe.post_processor = tokenizer.post_processor
    made = probe.encode("x")
    where = f"data.tokenizer={shown(path)}: its post_processor"
    if 0 not in made.special_tokens_mask:
        raise ConfigError(f"{where} leaves the text out; mend its template")
    at = made.special_tokens_mask.index(0)
    before, after = made.ids[:at], made.ids[at + 1 :]
    for token in (*before, *after):
        if token >= MOST_TOKENS:
            raise ConfigError(f"{where} has the id {token:,}, need less than {MOST_TOKENS:,}; mend its template")
    return before, after


def _named(tokenizer: tokenizers.Tokenizer, folder: Path, files: dict[str, dict], kind: str) -> list[int]:
    """Return the ids that the files give for `kind`, "bos" or "eos", those that count more first."""
    found = []
    for file in _NAMES:
        field, given = f"{kind}_token", files[file].get(f"{kind}_token")
        name = given.get("content") if isinstance(given, dict) else given
        try:
            known = None if name is None else tokenizer.token_to_id(name)
        except (TypeError, UnicodeEncodeError) as error:  # half of a pair of surrogates is no text
            raise _wrong(folder / file, field, given, "need the text of a token") from error
        found += [] if known is None else [known]
    for file in _IDS:
        found += token_ids(folder / file, files[file], f"{kind}_token_id")[:1]
    return found


def token_ids(path: Path, values: dict[str, Any], field: str) -> list[int]:
    """Return the ids in a field of a JSON file's values: one, a list, or none; ConfigError for what is no id."""
    given = values.get(field)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(is_whole(token, 0) and token < MOST_TOKENS for token in ids):
        raise _wrong(path, field, given, "need ids of tokens")
    return ids


def _read(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file, {} where there is no such file."""
    return read_values(path) if os.path.isfile(path) else {}  # False for pipes, devices and links that are too long


def read_values(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file; ConfigError if it holds no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{printable(str(path))}: is no JSON; {_COPY}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{printable(str(path))}: holds no object with fields; {_COPY}")
    return values


def _wrong(path: Path, field: str, given: Any, need: str) -> ConfigError:
    return ConfigError(f"{printable(str(path))}: {field}={shown(given)}: {need}; mend the file")
