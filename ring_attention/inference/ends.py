"""The tokens with which a model says that a text has ended."""

import json
from pathlib import Path

from ring_attention.checks import ConfigError, is_whole, printable, shown
from ring_attention.data.tokenizers import Tokenizer
from ring_attention.training.trained import Trained

_FILES = ("config.json", "generation_config.json")


def end_tokens(trained: Trained, tokenizer: Tokenizer) -> list[int]:
    """`document_start`, since another document would begin, and every `eos_token_id` of a Hugging Face checkpoint.

    Raises:
      ConfigError: if a file that should name them is no JSON, or names no tokens.
    """
    found = {tokenizer.document_start}
    for path in map(Path, _files(trained)):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{printable(str(path))}: is no JSON; copy it again") from error
        given = values.get("eos_token_id") if isinstance(values, dict) else None
        named = given if isinstance(given, list) else [] if given is None else [given]
        if not all(is_whole(token, 0) for token in named):
            raise ConfigError(f"{printable(str(path))}: eos_token_id={shown(given)}: need ids of tokens; mend the file")
        found |= set(named)
    return sorted(found)


def _files(trained: Trained) -> list[Path]:
    """Files of Hugging Face that name ends of texts."""
    if trained.source is not None:
        paths = [trained.checkpoint / name for name in _FILES]
    else:
        paths = [] if trained.kept is None else [trained.kept.other(name) for name in _FILES]
    return [path for path in paths if path.is_file()]
