"""Text to token ids, and back to the exact bytes, so that a loss can be told in bits per byte."""

import copy
import functools
import json
import os
import types
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import ArrayLike

from ring_attention.checks import ConfigError, one_line, printable, require, require_field, shown
from ring_attention.data.special_tokens import MOST_TOKENS, find_borders

BYTES = "bytes"


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer.

    Attributes:
      vocab_size: ids lie in [0, vocab_size), those below among them.
      document_start: the id that opens every packed document.
      document_end: the id that ends it: the target of its last token. It may be `document_start`.
      prompt_start: ids that are put before a text that a model reads alone, as those who made the tokenizer do.
      special_tokens: the spelling of each special token, by id. `encode` gives them where a text spells them,
        unless told not to.
    """

    vocab_size: int
    document_start: int
    document_end: int
    prompt_start: tuple[int, ...]
    special_tokens: Mapping[int, str]

    def encode(self, text: bytes, *, special_tokens: bool = True) -> np.ndarray:
        """Encode a text in UTF-8 as int32 [tokens]; nothing is put before or after it.

        Special tokens that are spelled out in it become their ids, as with `tokenizers`; without `special_tokens` they
        are text like any other, for documents that must not forge their own end.
        """

    def token_bytes(self, ids: ArrayLike) -> bytes:
        """Return the bytes of tokens, int [tokens]; none for the start and the end. Unknown ids raise ValueError."""

    def in_words(self) -> str:
        """Say in a line which tokens documents open and end with."""


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer that DataConfig.tokenizer names: "bytes" or the path of a Hugging Face tokenizer.json.

    Raises ConfigError if there is no such file or it is not a tokenizer.
    """
    return ByteTokenizer() if spec == BYTES else HuggingFaceTokenizer(spec)


class ByteTokenizer:
    """A token is a byte; id 256 opens a document and ends it. No text spells it, whatever is asked for."""

    vocab_size = 257
    document_start = document_end = 256
    prompt_start = (256,)
    special_tokens = types.MappingProxyType({256: "<s>"})

    def encode(self, text: bytes, *, special_tokens: bool = True) -> np.ndarray:
        """Encode a text in UTF-8 as int32 [tokens]."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def token_bytes(self, ids: ArrayLike) -> bytes:
        """Return the bytes that the tokens stand for."""
        ids = np.asarray(ids, np.int64)
        _require_known(ids, self.vocab_size)
        return ids[ids != self.document_start].astype(np.uint8).tobytes()

    def in_words(self) -> str:
        """Say in a line which tokens documents open and end with."""
        return f"Documents open and end with {self.document_start}; other tokens are their bytes."


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`.

    The tokens around a document are those that the file's post-processor, tokenizer_config.json and config.json beside
    it name (`find_borders`). Where nothing names any, documents open and end with one new id past the vocabulary, as
    `in_words` says. Special tokens that are spelled out in a text are encoded as that text unless asked otherwise.
    Truncation and padding that the file asks for are switched off: every text is encoded whole, and nothing else.

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
        size = 1 + max(vocabulary.values())  # not their number: some vocabularies have holes
        problem = f"has ids up to {size - 1:,}, need less than {MOST_TOKENS:,}"
        require_field(size < MOST_TOKENS, "data.tokenizer", path, problem, "number its tokens from 0 on")
        borders = find_borders(self._tokenizer, path)
        self._new = borders.start is None
        self.document_start = size if borders.start is None else borders.start
        self.document_end = self.document_start if borders.end is None else borders.end
        self.prompt_start = borders.fed
        around = {self.document_start, self.document_end, *self.prompt_start}
        self.vocab_size = max(size, *(1 + token for token in around))
        names = {token: self._tokenizer.id_to_token(token) or f"<{token}>" for token in around}
        _make_special(self._tokenizer, names.values(), vocabulary)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = names | {i: token.content for i, token in added.items() if token.special}
        self._bytes_of_id = self._byte_level_table(vocabulary) if _is_byte_level(self._tokenizer) else None

    def encode(self, text: bytes, *, special_tokens: bool = True) -> np.ndarray:
        """Encode a text in UTF-8 as int32 [tokens]; raises ConfigError for one that the tokenizer has no tokens for."""
        encoder = self._special_encoder if special_tokens else self._tokenizer
        try:
            return np.array(encoder.encode(text.decode(), add_special_tokens=False).ids, np.int32)
        except Exception as error:  # the library raises Exception itself
            problem = f"cannot encode a document that begins {shown(text[:40])} ({one_line(error)})"
            remedy = "give the tokenizer a token for what it does not know, or bytes to fall back on"
            raise ConfigError(f"data.tokenizer={shown(self._path)}: {problem}; {remedy}") from error

    @functools.cached_property
    def _special_encoder(self) -> tokenizers.Tokenizer:
        """A copy that encodes special tokens as their ids, which is a setting of an object that threads share."""
        encoder = copy.deepcopy(self._tokenizer)
        encoder.encode_special_tokens = False
        return encoder

    def in_words(self) -> str:
        """Say in a line which tokens documents open and end with."""
        start, end = (self._spelled(token) for token in (self.document_start, self.document_end))
        if self._new:
            named = f"The tokenizer names no token for it: documents open with a new one, {start}"
        else:
            named = f"Documents open with {start}"
        return f"{named}, and end with {end}."

    def _spelled(self, token: int) -> str:
        return f"{printable(self.special_tokens[token])} ({token})"

    def token_bytes(self, ids: ArrayLike) -> bytes:
        """Return the bytes that the tokens stand for."""
        ids = np.asarray(ids, np.int64)
        _require_known(ids, self.vocab_size)
        ids = ids[(ids != self.document_start) & (ids != self.document_end)].tolist()
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


def _make_special(tokenizer: tokenizers.Tokenizer, names: Iterable[str], vocabulary: dict[str, int]) -> None:
    """Let no text spell the tokens around a document, where the file has them for ordinary ones (as transformers)."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for name in names:
        if name in vocabulary and name not in special:
            tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])


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
