"""The lengths of a corpus' documents in tokens, and rows that are packed from documents drawn like them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ring_attention.data.config import DataConfig
from ring_attention.data.sources import open_documents
from ring_attention.data.tokenizers import BYTES, load_tokenizer

ASSUMED_BYTES = 4.0
"""Bytes of a token of text, where no tokenizer is there to count them."""

MOST_BYTE_TOKENS = 512
"""The largest vocabulary of which it is taken that its tokens are bytes."""

SAMPLED, SAMPLED_BYTES = 256, 2**16
"""How many documents are read to find how many tokens a byte of their files has, and how far each is encoded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentLengths:
    """How long the documents of a corpus are.

    Attributes:
      paths: globs of the files.
      tokens: int64 [documents], each with the token that opens it.
      counted: how bytes became tokens, in words.
    """

    paths: str
    tokens: np.ndarray
    counted: str

    @staticmethod
    def read(data: DataConfig, vocab_size: int) -> "DocumentLengths":
        """Open the documents of `data.paths` and count their tokens.

        A sample spread over the corpus is read, which says how many tokens a byte of the files has. The tokenizer of
        `data.tokenizer` encodes it; where its file is not there, or is "bytes" beside a larger vocabulary, a token is
        taken to have ASSUMED_BYTES.

        Raises:
          ConfigError: for documents that cannot be read.
        """
        source, encode = open_documents(data), None
        if data.tokenizer != BYTES and Path(data.tokenizer).expanduser().exists():
            tokenizer, words = load_tokenizer(data.tokenizer), f"counted by {data.tokenizer}"
            encode = functools.partial(tokenizer.encode, special_tokens=data.special_tokens)
        elif data.tokenizer == BYTES and vocab_size <= MOST_BYTE_TOKENS:
            words = "a byte each"
        else:
            words = f"assumed of {ASSUMED_BYTES:g} bytes each: no tokenizer for {vocab_size:,} tokens is there"
        stored, size = source.column("length").astype(np.int64), ASSUMED_BYTES if "assumed" in words else 1.0
        chosen = np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(np.int64))
        read = np.array([_tokens_of(source[number].text, size, encode) for number in chosen.tolist()])
        tokens = np.ceil(stored * (read.sum() / stored[chosen].sum()))
        tokens[chosen] = np.ceil(read)
        return DocumentLengths(paths=data.paths, tokens=1 + tokens.astype(np.int64), counted=words)

    def rows(self, seq_len: int, *, seed: int = 0) -> Iterator[np.ndarray]:
        """Pack rows of `seq_len` tokens without end, as the loader does: int64 [documents], each document's tokens.

        The documents come in an order drawn anew whenever all have been seen, and what does not fit into a row goes on
        in the next one, where it is a document of its own.
        """
        random, ends = np.random.default_rng(seed), np.empty(0, np.int64)
        while True:
            while not len(ends) or ends[-1] < seq_len:
                drawn = np.cumsum(random.permutation(self.tokens))
                ends = np.concatenate([ends, drawn + (ends[-1] if len(ends) else 0)])
            inside = ends[ends < seq_len]
            yield np.diff(inside, prepend=0, append=seq_len)
            ends = ends[len(inside) :] - seq_len
            ends = ends[ends > 0]


def _tokens_of(text: bytes, size: float, encode: Callable[[bytes], np.ndarray] | None) -> float:
    """Count a text's tokens, of so many bytes each; or encode its beginning, and take the rest to be like it."""
    if encode is None:
        return len(text) / size
    beginning = text[:SAMPLED_BYTES]
    return len(encode(beginning)) * len(text) / len(beginning)
