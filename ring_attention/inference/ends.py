"""The tokens that stand before what a model continues, and those with which it says that a text has ended."""

import os
from pathlib import Path

from ring_attention.data.special_tokens import read_values, token_ids
from ring_attention.data.tokenizers import Tokenizer
from ring_attention.training.trained_model import TrainedModel

_FILES = ("config.json", "generation_config.json")


def prompt_start(trained: TrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that a prompt opens with: `document_start`, as packed documents do.

    A model that came from Hugging Face gets what `transformers` feeds it instead, for Qwen nothing.
    """
    came_from_hf = trained.source is not None or trained.manifest is not None
    return list(tokenizer.prompt_start) if came_from_hf else [tokenizer.document_start]


def end_tokens(trained: TrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a text.

    They are `document_end`, `document_start`, since another document would begin, and every `eos_token_id` of a Hugging
    Face checkpoint.

    Raises:
      ConfigError: if a file that should name them is no JSON, or names no tokens.
    """
    found = {tokenizer.document_start, tokenizer.document_end}
    for path in _files(trained):
        found.update(token_ids(path, read_values(path), "eos_token_id"))
    return sorted(found)


def _files(trained: TrainedModel) -> list[Path]:
    """Return the files of Hugging Face that name the ends of texts."""
    if trained.source is not None:
        paths = [trained.checkpoint / name for name in _FILES]
    else:
        paths = [] if trained.manifest is None else [trained.manifest.other(name) for name in _FILES]
    return [path for path in paths if os.path.isfile(path)]
