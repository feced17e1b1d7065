"""The section `data` of a config: which documents to train on, and how they become tokens."""

import dataclasses

from ring_attention.checks import require_field, require_local

PYTHON_STDLIB = "python-stdlib"
REFUSE, SKIP = "refuse", "skip"
MOST_BYTES = 2**31 - 1  # positions in a document are int32
MOST_STREAMS = 65_536


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Documents and how they become tokens.

    Attributes:
      paths: "python-stdlib" (the standard library's own source files, found on any machine that runs Python), or file
        globs separated by commas. `*.jsonl`, `*.ndjson`, `*.jsonlines`, and `*.json` of several lines hold one document
        a line, any other file is one UTF-8 document; either may be gzipped (`.gz`).
      text_field: the field of a JSONL object that holds the text.
      bad_documents: what to do about a document that cannot be used: "refuse" to run, naming the first, or "skip" it
        and say how many were left out, and why.
      max_document_bytes: the longest document that is read: bytes of a text file, or of a line of a JSONL file, after
        decompression. No more of a longer one is ever in memory. 256 MiB by default.
      tokenizer: "bytes", or the path of a Hugging Face `tokenizer.json`.
      train_on_end: whether the token that ends a document is learned, so that generation ends by itself.
      special_tokens: whether special tokens that a document spells out, such as "<|im_start|>", become their ids. By
        default they are text like any other, so that no document can end itself and open another.
      holdout_fraction: share of the documents, chosen by a hash of their name, that is never trained on; of a single
        document its end.
      seed: decides the order in which documents are read.
      streams: documents that are read side by side, their rows in turn, so that consecutive steps see different ones.
      index_dir: the folder that keeps what was found when the documents were read, so that the next start reads only
        what changed, and the texts of gzipped JSON lines, unpacked (as large as the lines are without gzip). Empty: the
        folder "documents" of the run, for 16 MiB and more; several runs on the same documents can share one.
    """

    paths: str = PYTHON_STDLIB
    text_field: str = "text"
    bad_documents: str = REFUSE
    max_document_bytes: int = 256 * 2**20
    tokenizer: str = "bytes"
    train_on_end: bool = True
    special_tokens: bool = False
    holdout_fraction: float = 0.05
    seed: int = 0
    streams: int = 16
    index_dir: str = ""

    def __post_init__(self):
        require_field(
            bool(self.paths.strip(" ,")),
            "data.paths",
            self.paths,
            "names no file",
            "give globs such as 'corpus/**/*.txt'",
        )
        for path in self.paths.split(","):
            require_local("data.paths", path)
        require_local("data.tokenizer", self.tokenizer)
        require_field(
            self.bad_documents in (REFUSE, SKIP),
            "data.bad_documents",
            self.bad_documents,
            "is not known",
            f"choose {REFUSE!r} or {SKIP!r}",
        )
        require_field(
            0 < self.max_document_bytes <= MOST_BYTES,
            "data.max_document_bytes",
            self.max_document_bytes,
            f"must lie in [1, {MOST_BYTES}]",
            "leave it out to take the default, 268435456",
        )
        require_field(
            0 < self.holdout_fraction < 1,
            "data.holdout_fraction",
            self.holdout_fraction,
            "must lie between 0 and 1, since every run is measured on text that is held back",
            "0.05 holds back one document in twenty, or the end of a single one",
        )
        require_field(0 <= self.seed < 2**32, "data.seed", self.seed, "must lie in [0, 2**32)", "choose another")
        require_field(
            0 < self.streams <= MOST_STREAMS,
            "data.streams",
            self.streams,
            f"must lie in [1, {MOST_STREAMS}], since each holds a document in memory",
            "use 1 to read in one order",
        )
