"""What `attention.layout="auto"` means for a run: rows dealt by their documents where those are short, else zigzag."""

import dataclasses

import numpy as np

from ring_attention.attention.kernels import KERNELS
from ring_attention.attention.kernels.choose import FUSED
from ring_attention.attention.kernels.contract import Kernel
from ring_attention.parallel.mesh import SEQUENCE
from ring_attention.training.attend import reach_of
from ring_attention.training.attention_config import AUTO, DOCUMENTS
from ring_attention.training.batches import Corpus
from ring_attention.training.config import TrainConfig
from ring_attention.training.validate import check_attention

SHORT = 0.25
"""The most of a row that the document of an average token may fill, for documents to be short."""
SAMPLED, SAMPLED_BYTES = 16, 2**16
"""Documents that are encoded to learn how many bytes a token has, and how many bytes of each."""


def with_layout(config: TrainConfig, corpus: Corpus, mesh_shape: dict[str, int], platform: str) -> TrainConfig:
    """Return the config with the layout that its run has in place of "auto"; the same whoever asks, and whenever."""
    if config.attention.layout != AUTO:
        return config
    dealt = dataclasses.replace(config, attention=dataclasses.replace(config.attention, layout=DOCUMENTS))
    short = mesh_shape[SEQUENCE] > 1 and share_of_row(corpus, config.seq_len) <= SHORT
    return dealt if short and _can_deal(config, dealt, mesh_shape, platform) else config


def share_of_row(corpus: Corpus, seq_len: int) -> float:
    """Return how much of a row of `seq_len` tokens the document of an average training token fills, from 0 to 1."""
    lengths = corpus.train.column("length") * _tokens_of_byte(corpus)
    return float((lengths * np.minimum(lengths, seq_len)).sum() / lengths.sum() / seq_len)


def _tokens_of_byte(corpus: Corpus) -> float:
    """Return how many tokens a byte of a document in its file makes, by documents from everywhere in the corpus."""
    numbers = np.linspace(0, len(corpus.train) - 1, min(SAMPLED, len(corpus.train))).astype(int)
    tokens = 0.0
    for number in numbers.tolist():
        text = corpus.train[number].text
        part = text[:SAMPLED_BYTES].decode(errors="ignore").encode()
        encoded = corpus.tokenizer.encode(part or text, special_tokens=False)
        tokens += 1 + len(encoded) * len(text) / len(part or text)
    return tokens / float(corpus.train.column("length")[numbers].sum())


def _can_deal(config: TrainConfig, dealt: TrainConfig, mesh_shape: dict[str, int], platform: str) -> bool:
    """Whether all layers see whole documents, and strategies and no slower kernel can do it where rows are dealt."""
    if any(kind.chunk or reach_of(config.attention, kind) for kind in config.transformer.kinds):
        return False
    if not _accepts(dealt, mesh_shape, None):
        return False
    faster = FUSED.get(platform, ()) if config.attention.impl == "auto" else ()
    return all(_accepts(dealt, mesh_shape, KERNELS[k]) or not _accepts(config, mesh_shape, KERNELS[k]) for k in faster)


def _accepts(config: TrainConfig, mesh_shape: dict[str, int], kernel: Kernel | None) -> bool:
    try:
        check_attention(config, mesh_shape, kernel)
    except ValueError:
        return False
    return True
