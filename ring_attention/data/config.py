"""What to train on."""

import dataclasses

from ring_attention.checks import require_field

PYTHON_STDLIB = "python-stdlib"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Documents and how they become tokens.

    Attributes:
      paths: "python-stdlib" (the standard library's own source files, found on any machine that runs Python), or file
        globs separated by commas. `*.jsonl` holds one document a line, any other file is one UTF-8 document; either may
        be gzipped (`.gz`).
      text_field: the field of a JSONL object that holds the text.
      tokenizer: "bytes", or the path of a Hugging Face `tokenizer.json`.
      holdout_fraction: share of the documents, chosen by a hash of their name, that is never trained on.
      seed: of the order in which documents are read.
      streams: documents that are read side by side, their rows in turn, so that consecutive steps see different ones.
    """

    paths: str = PYTHON_STDLIB
    text_field: str = "text"
    tokenizer: str = "bytes"
    holdout_fraction: float = 0.05
    seed: int = 0
    streams: int = 16

    def __post_init__(self):
        require_field(
            bool(self.paths.strip(" ,")),
            "data.paths",
            self.paths,
            "names no file",
            "give globs such as 'corpus/**/*.txt'",
        )
        require_field(
            0 < self.holdout_fraction < 1,
            "data.holdout_fraction",
            self.holdout_fraction,
            "must lie between 0 and 1",
            "0.05 holds back one document in twenty",
        )
        require_field(0 <= self.seed < 2**32, "data.seed", self.seed, "must lie in [0, 2**32)", "choose another")
        require_field(self.streams > 0, "data.streams", self.streams, "must be positive", "use 1 to read in one order")
