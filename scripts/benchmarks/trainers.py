"""A training step of one model as this library takes it, and as PyTorch with transformers does, on the same tokens."""

import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from ring_attention.checks import require
from ring_attention.data.loader import TrainLoader
from ring_attention.models.hf.export import write_standard
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.mesh import make_mesh
from ring_attention.parallel.simulate import simulate_devices
from ring_attention.training.batches import Corpus, Feed
from ring_attention.training.config import TrainConfig
from ring_attention.training.devices import keep_freed_memory
from ring_attention.training.hf_conversion import export_config
from ring_attention.training.state import make_schedule, make_state
from ring_attention.training.step import make_train_step
from scripts.benchmarks.step_parts import BACKWARD, FORWARD, measure_parts

OURS, EAGER, KEPT, COMPILED = "ours", "PyTorch", "PyTorch, freed memory kept", "PyTorch, torch.compile"
BASELINES = (EAGER, KEPT, COMPILED)
"""PyTorch as transformers sets it up; the same with our `keep_freed_memory`; compiled."""

PRODUCTS, UPDATE, ELSE = "products with weights", "optimizer and clipping", "everything else"
"""Parts of PyTorch's step, beside FORWARD and BACKWARD of attention."""


class Trainer(Protocol):
    """One of those that are compared."""

    def run(self) -> float:
        """Take a step; return the loss before its update, nats per target."""

    def parts(self) -> dict[str, float]:
        """Take a step; return its seconds by part, which sum to those on the wall."""


def make_trainer(kind: str, config: TrainConfig, weights: Path) -> Trainer:
    """A trainer of its kind, for a process of its own; OURS writes the initial parameters, the others read them.

    Args:
      kind: OURS or one of BASELINES.
      config: whose `data.paths` are as `write_text` makes them.
      weights: folder of a Hugging Face checkpoint; it must not exist yet for OURS.
    """
    if kind in (OURS, KEPT):
        keep_freed_memory()
    if kind != OURS:
        return TorchTrainer(config, weights, compiled=kind == COMPILED)
    weights.mkdir()
    simulate_devices(config.mesh.sp)
    trainer = OurTrainer(config)
    trainer.write_weights(weights)
    return trainer


def has_baselines() -> bool:
    """Return whether PyTorch and transformers are installed."""
    try:
        return all(importlib.metadata.version(name) for name in ("torch", "transformers"))
    except importlib.metadata.PackageNotFoundError:
        return False


def write_text(folder: Path, seq_len: int, documents: int) -> None:
    """Write text of the standard library as documents that fill a row each: seq_len - 1 letters and a first token.

    So every row is one document from its beginning, whose tokens all see those before them, as transformers takes it.
    """
    text, size = "", seq_len - 1
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text += path.read_bytes().decode("ascii", errors="ignore")
        if len(text) >= size * documents:
            break
    require(len(text) >= size * documents, f"the standard library has no {size * documents} letters; use a shorter row")
    for number in range(documents):
        (folder / f"{number:04d}.txt").write_text(text[number * size : (number + 1) * size], encoding="ascii")


class OurTrainer:
    """Our trainer: the loop of `training.run` without its checkpoints: the real loader and the real step.

    Ends of documents are no targets, as for transformers, where a row's last token has none.
    """

    def __init__(self, config: TrainConfig):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_on_end=False))
        self._config, devices = config, config.mesh.sp
        mesh = make_mesh(sp=devices, devices=jax.devices()[:devices])
        self._feed = Feed(config, mesh, Corpus.open(config.data))
        self._state, (_, self._batch) = make_state(config, mesh), next(self._feed)
        self._step = make_train_step(config, mesh).lower(self._state, self._batch).compile()

    def write_weights(self, folder: Path) -> None:
        """Write the parameters as a Hugging Face checkpoint into an empty folder."""
        hf = export_config(self._config, None)
        write_standard(self._state.params, hf, "float32", folder, lambda *_: None, extra={})

    def run(self) -> float:
        """Take a step; the next batch is loaded while the devices compute."""
        self._state, metrics = self._step(self._state, self._batch)
        _, self._batch = next(self._feed)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def parts(self) -> dict[str, float]:
        """Seconds of a step by part, of `step_parts.PARTS`."""
        return measure_parts(self.run, self._step.as_text(), self._config.mesh.sp)


class TorchTrainer:
    """A training loop as a user of transformers writes it.

    Raises ImportError where torch or transformers is missing.
    """

    def __init__(self, config: TrainConfig, weights: Path, *, compiled: bool):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of PyTorch's profiler
        import torch
        from transformers import LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._torch, optimizer = torch, config.optimizer
        model = LlamaForCausalLM.from_pretrained(weights, attn_implementation="sdpa", dtype=torch.float32)
        model.config.use_cache = False
        self._model = model.train()
        self._forward = torch.compile(model) if compiled else model
        norms = {name: "norm" in name for name, _ in model.named_parameters()}
        groups = [[p for name, p in model.named_parameters() if norms[name] is normed] for normed in (False, True)]
        self._optimizer = torch.optim.AdamW(
            [dict(params=groups[0], weight_decay=optimizer.weight_decay), dict(params=groups[1], weight_decay=0.0)],
            lr=0.0,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.epsilon,
            fused=True,
        )
        self._clip_norm, self._rows = optimizer.clip_norm, make_rows(config)
        self._rates = map(float, map(make_schedule(config), range(config.num_steps)))

    def run(self) -> float:
        """Take a step; rows are tokenized before the clock runs."""
        tokens, rate = self._torch.from_numpy(next(self._rows)), next(self._rates)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = self._forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def parts(self) -> dict[str, float]:
        """Seconds of a step by part, by PyTorch's profiler; unembedding counts as a product."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            start = time.perf_counter()
            self.run()
            whole = time.perf_counter() - start
        seconds = dict.fromkeys((FORWARD, BACKWARD, PRODUCTS, UPDATE), 0.0)
        for event in profiled.key_averages():
            part = _part_of_torch(event.key)
            if part is not None:
                seconds[part] += event.self_cpu_time_total / 1e6
        return seconds | {ELSE: whole - sum(seconds.values())}


def _part_of_torch(key: str) -> str | None:
    if key.startswith("aten::_scaled_dot_product"):
        return BACKWARD if "backward" in key else FORWARD
    if key in ("aten::mm", "aten::addmm", "aten::bmm", "mkl::_mkl_linear", "aten::mkldnn_linear"):
        return PRODUCTS
    return UPDATE if "adam" in key.lower() or "_foreach" in key else None


def make_rows(config: TrainConfig) -> Iterator[np.ndarray]:
    """Yield the tokens of the batches that `OurTrainer` takes, int64 [rows, seq_len] in natural order."""
    corpus = Corpus.open(config.data)
    loader = TrainLoader(
        corpus.train,
        corpus.tokenizer,
        seed=config.data.seed,
        streams=config.data.streams,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        layout=SequenceLayout("contiguous", 1),
    )
    batches = [next(loader) for _ in range(len(corpus.train))]
    for batch in batches:
        whole = (batch["segment_ids"] == 1).all() and (batch["positions"] == np.arange(config.seq_len)).all()
        require(whole, "a row is not one document from its beginning, as transformers takes it; use `write_text`")
    while True:
        yield from (batch["tokens"].astype(np.int64) for batch in batches)
