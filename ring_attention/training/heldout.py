"""The loss on held-out text."""

import math

from jax.sharding import Mesh, NamedSharding

from ring_attention.data.loader import deal_batches, held_out_rows, spell_rows
from ring_attention.parallel.mesh import SEQUENCE
from ring_attention.training.config import TrainConfig
from ring_attention.training.corpus import Corpus
from ring_attention.training.feed import place
from ring_attention.training.step import BATCH_SPEC, make_eval_step


class HeldOut:
    """The fixed rows that a run is measured on: their text, without the ends of documents, which training counts too.

    Attributes:
      segments: the rows spelled in bytes, (context, predicted) for each segment.
      num_bytes: bytes that are predicted.
      bits_per_byte_of: bits per byte for one nat per token, on this text: tokens / (bytes * ln 2).
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, corpus: Corpus):
        rows = held_out_rows(
            corpus.held_out,
            corpus.tokenizer,
            seq_len=config.seq_len,
            num_sequences=config.eval_sequences,
            special_tokens=config.data.special_tokens,
        )
        layout = config.attention.make_layout(mesh.shape[SEQUENCE])
        batches = deal_batches(rows, batch_size=config.micro_batch_size, layout=layout)
        sharding, every = NamedSharding(mesh, BATCH_SPEC), list(range(config.micro_batch_size))
        self._batches = [place(batch, every, config.micro_batch_size, sharding) for batch in batches]
        self._evaluate = make_eval_step(config, mesh)
        self.segments = spell_rows(rows, corpus.tokenizer)
        self.num_bytes = sum(len(predicted) for _, predicted in self.segments)
        self._num_targets = sum(int(row["loss_mask"].sum()) for row in rows)
        self.bits_per_byte_of = self._num_targets / (self.num_bytes * math.log(2))

    def loss(self, params) -> float:
        """Mean negative log-likelihood in nats per token."""
        sums = [self._evaluate(params, batch) for batch in self._batches]
        return sum(float(nats) for nats, _ in sums) / self._num_targets
