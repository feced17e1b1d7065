"""The documents of a run and what is held back from it."""

import dataclasses

from ring_attention.data.bad import DataReport
from ring_attention.data.config import DataConfig
from ring_attention.data.sources import DocumentSource, open_documents, split_documents
from ring_attention.data.tokenizers import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents held out, the tokenizer that both go through, and what was left out."""

    train: DocumentSource
    held_out: DocumentSource
    tokenizer: Tokenizer
    report: DataReport

    @staticmethod
    def open(config: DataConfig) -> "Corpus":
        """Open and check the files; ConfigError for those that cannot be used."""
        tokenizer = load_tokenizer(config.tokenizer)
        source = open_documents(config)
        return Corpus(*split_documents(source, config.holdout_fraction), tokenizer, source.report)
