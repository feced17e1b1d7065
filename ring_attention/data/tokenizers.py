"""Text to token ids, and back to the exact bytes, so that a loss can be told in bits per byte."""

import json
import os
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import ArrayLike

from ring_attention.checks import ConfigError, one_line, require, require_field, shown

BYTES = "bytes"
DOCUMENT_START_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[BOS]")
MOST_TOKENS = 2**24
"""Of a vocabulary: sixty times the largest in use. A table of them is held in memory."""


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer.

    Attributes:
      vocab_size: ids lie in [0, vocab_size), `document_start` among them.
      document_start: the id that opens every document; no text encodes to it.
    """

    vocab_size: int
    document_start: int

    def encode(self, text: bytes) -> np.ndarray:
        """Encode a text in UTF-8 as int32 [tokens], without special tokens."""

    def token_bytes(self, ids: ArrayLike) -> bytes:
        """Return the bytes of tokens, int [tokens]; none for `document_start`. Unknown ids raise ValueError."""


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer that DataConfig.tokenizer names: "bytes" or the path of a Hugging Face tokenizer.json.

    Raises ConfigError if there is no such file or it is not a tokenizer.
    """
    return ByteTokenizer() if spec == BYTES else HuggingFaceTokenizer(spec)


class ByteTokenizer:
    """A token is a byte; id 256 opens a document."""

    vocab_size = 257
    document_start = 256

    def encode(self, text: bytes) -> np.ndarray:
        """Encode a text in UTF-8 as int32 [tokens]."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def token_bytes(self, ids: ArrayLike) -> bytes:
        """Return the bytes that the tokens stand for."""
        ids = np.asarray(ids, np.int64)
        _require_known(ids, self.vocab_size)
        return ids[ids != self.document_start].astype(np.uint8).tobytes()


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`.

    document_start is the file's own special token for it (the first of DOCUMENT_START_NAMES that it has), or else one
    new id past the vocabulary. Special tokens that are spelled out in a text are encoded as that text. Truncation and
    padding that the file asks for are switched off: every text is encoded whole, and nothing else.

    The bytes of byte-level vocabularies (GPT-2, Llama 3, Qwen) are exact, token by token. Others (SentencePiece) can
    only be decoded together: their bytes are exact but for what the file's normalizer and decoder change, such as a
    leading space.
    """

    def __init__(self, path: str):
        self._path, self._tokenizer = path, _read_tokenizer(path)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        require_field(bool(vocabulary), "data.tokenizer", path, "has an empty vocabulary", "train it first")
        self.vocab_size = 1 + max(vocabulary.values())  # not their number: some vocabularies have holes
        problem = f"has ids up to {self.vocab_size - 1:,}, need less than {MOST_TOKENS:,}"
        require_field(self.vocab_size < MOST_TOKENS, "data.tokenizer", path, problem, "number its tokens from 0 on")
        special = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        starts = [special[name] for name in DOCUMENT_START_NAMES if name in special]
        if not starts:
            starts = [self.vocab_size]
            self.vocab_size += 1
        self.document_start = starts[0]
        self._bytes_of_id = self._byte_level_table(vocabulary) if _is_byte_level(self._tokenizer) else None

    def encode(self, text: bytes) -> np.ndarray:
        """Encode a text in UTF-8 as int32 [tokens]; raises ConfigError for one that the tokenizer has no tokens for."""
        try:
            return np.array(self._tokenizer.encode(text.decode(), add_special_tokens=False).ids, np.int32)
        except Exception as error:  # the library raises Exception itself
            problem = f"cannot encode a document that begins {shown(text[:40])} ({one_line(error)})"
            remedy = "give the tokenizer a token for what it does not know, or bytes to fall back on"
            raise ConfigError(f"data.tokenizer={shown(self._path)}: {problem}; {remedy}") from error

    def token_bytes(self, ids: ArrayLike) -> bytes:
        """Return the bytes that the tokens stand for."""
        ids = np.asarray(ids, np.int64)
        _require_known(ids, self.vocab_size)
        ids = ids[ids != self.document_start].tolist()
        if self._bytes_of_id is None:
            return self._tokenizer.decode(ids, skip_special_tokens=False).encode()
        return b"".join(self._bytes_of_id[i] for i in ids)

    def _byte_level_table(self, vocabulary: dict[str, int]) -> list[bytes]:
        """List the bytes of each id; added tokens are spelled in plain text, not in the byte-level alphabet."""
        byte_of_letter = byte_level_letters()
        table = [b""] * self.vocab_size
        added = self._tokenizer.get_added_tokens_decoder()
        for token, i in vocabulary.items():
            is_plain = i in added or not byte_of_letter.keys() >= set(token)
            table[i] = token.encode() if is_plain else bytes(byte_of_letter[letter] for letter in token)
        return table


def _read_tokenizer(path: str) -> tokenizers.Tokenizer:
    need, remedy = "is neither 'bytes' nor a file", "give the path of a tokenizer.json"
    require_field(os.path.isfile(path), "data.tokenizer", path, need, remedy)
    try:
        return tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises Exception itself
        problem = f"is no Hugging Face tokenizer ({one_line(error)})"
        raise ConfigError(f"data.tokenizer={shown(path)}: {problem}; {remedy}") from error


def _require_known(ids: np.ndarray, vocab_size: int) -> None:
    unknown = ids[(ids < 0) | (ids >= vocab_size)]
    got, remedy = unknown[:5].tolist(), "use the tokenizer that the ids were made with"
    require(unknown.size == 0, f"token ids {got} are outside [0, {vocab_size}); {remedy}")


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def byte_level_letters() -> dict[str, int]:
    """Map each letter of byte-level vocabularies to its byte: printable Latin-1 is itself, the rest count from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
