"""The documents of a run and what is held back from it."""

import dataclasses
from pathlib import Path

from ring_attention.checks import printable
from ring_attention.data.bad import DataReport
from ring_attention.data.config import DataConfig
from ring_attention.data.sources import DocumentSource, open_documents, split_documents
from ring_attention.data.tokenizers import BYTES, Tokenizer, load_tokenizer

LOOKED_AT, LOOKED_AT_BYTES, NAMED = 32, 2**16, 3
"""Documents in which special tokens are looked for, and how far; how many of these are named."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents held out, the tokenizer that both go through, and what was left out."""

    train: DocumentSource
    held_out: DocumentSource
    tokenizer: Tokenizer
    report: DataReport

    @staticmethod
    def open(config: DataConfig, index_dir: Path | None = None) -> "Corpus":
        """Open and check the files; ConfigError for those that cannot be used.

        `index_dir` keeps what was found for the next start, unless `config.index_dir` names another place.
        """
        tokenizer = load_tokenizer(config.tokenizer)
        train, held_out = split_documents(open_documents(config, index_dir), config.holdout_fraction)
        return Corpus(train, held_out, tokenizer, train.report)

    def describe_tokens(self, config: DataConfig) -> list[str]:
        """Lines that say which tokens stand around documents, and of special tokens that the first few spell out."""
        if config.tokenizer == BYTES:
            return []
        lines = [self.tokenizer.in_words()]
        spelled = [] if config.special_tokens else self._spelled_tokens()
        if spelled:
            names = ", ".join(printable(name) for name in spelled[:NAMED])
            lines.append(
                f"Documents spell out special tokens, such as {names}: they are read as text. "
                "--config.data.special_tokens=true reads them as tokens."
            )
        return lines

    def _spelled_tokens(self) -> list[str]:
        """Special tokens whose spelling stands in the first LOOKED_AT held-out documents."""
        names = sorted(self.tokenizer.special_tokens.values())
        looked_at = range(min(LOOKED_AT, len(self.held_out)))
        texts = [self.held_out[number].text[:LOOKED_AT_BYTES] for number in looked_at]
        return [name for name in names if any(name.encode() in text for text in texts)]
