"""Tokens to text as they come: characters whose bytes are still arriving wait, and so does what may become a stop."""

import codecs
from collections.abc import Sequence

from ring_attention.checks import require
from ring_attention.data.tokenizers import Tokenizer

_PROMPT_TAIL = 4  # tokens of the prompt that the first new one is decoded after
_UNFINISHED = "�".encode()  # as tokenizers that decode tokens together write bytes that are no character yet


class TextStream:
    """The text of one row, token by token, without special tokens unless they are asked for.

    Attributes:
      ended: whether a stop text was met; nothing comes after it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = (), *, show_special: bool = False
    ):
        """Begin after a prompt's tokens; the text ends before the first of the `stop` texts.

        Special tokens are spelled out if `show_special`, or else left out.
        """
        require(all(stop), "stop holds an empty text, which would end everything at once; leave it out")
        self.ended = False
        self._tokenizer, self._stop, self._show_special = tokenizer, tuple(stop), show_special
        self._ids = [int(token) for token in prompt[-_PROMPT_TAIL:]]  # a token's bytes may depend on the one before
        self._shown = len(self._ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting = ""

    def feed(self, token: int) -> str:
        """Take a token; return the text that is certain now and was not before."""
        name = self._tokenizer.special_tokens.get(int(token))
        if name is not None:
            if not self._show_special:
                return ""
            before = self._decoder.decode(self._new_bytes(last=True), final=True)
            return self._release(before + name, last=False)
        self._ids.append(int(token))
        new = self._new_bytes(last=False)
        return self._release(self._decoder.decode(new), last=False)

    def finish(self) -> str:
        """Return what was waiting for more."""
        text = self._decoder.decode(self._new_bytes(last=True), final=True)
        return self._release(text, last=True)

    def _new_bytes(self, *, last: bool) -> bytes:
        """Return the bytes of tokens that were not shown yet; none while they do not make whole characters."""
        if len(self._ids) == self._shown:  # those shown stay, for the sake of the token that comes next
            return b""
        known = self._tokenizer.token_bytes(self._ids[: self._shown])
        now = self._tokenizer.token_bytes(self._ids)
        if now.endswith(_UNFINISHED) and not last:
            return b""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return now[len(known) :]

    def _release(self, text: str, *, last: bool) -> str:
        """Return what of the waiting text and this may be shown: up to a stop, or to what may become one."""
        if self.ended:
            return ""
        text = self._waiting + text
        found = min((at for at in map(text.find, self._stop) if at >= 0), default=None)
        if found is not None:
            self.ended, self._waiting = True, ""
            return text[:found]
        held = 0 if last else max((_beginning_at_end(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]


def _beginning_at_end(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
