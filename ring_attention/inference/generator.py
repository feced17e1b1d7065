"""Text token by token: prompts in, tokens out as they come."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_attention.checks import is_whole, require, require_integers, shown
from ring_attention.inference.cache import CACHE_SPEC, KeyValueCache, cache_bytes
from ring_attention.inference.plan import make_plan
from ring_attention.inference.programs import ROWS, Rows, make_cache, make_extend, make_prefill, make_step
from ring_attention.inference.sampling import Sampling
from ring_attention.models.config import ModelConfig
from ring_attention.models.transformer import abstract_parameters, parameter_specs, resized_parameters
from ring_attention.parallel.layouts import SequenceLayout
from ring_attention.parallel.mesh import DATA, SEQUENCE, TENSOR
from ring_attention.training.config import AttentionConfig
from ring_attention.training.trained_model import TrainedModel

PROMPT_STEPS = 8
"""Lengths that prompts are padded to between one power of two and the next: each costs a compilation, and padding up to
an eighth of the prefill."""


class Generator:
    """A model that continues prompts, over the devices of a mesh: rows over dp, the cache over sp, heads over tp.

    Its programs are compiled when they are first needed: a prefill for each length that prompts are padded to and
    number of rows, and one step for each number of rows.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        *,
        mesh: Mesh,
        capacity: int,
        attention: AttentionConfig | None = None,
        sampling: Sampling | None = None,
        vocab_size: int | None = None,
        chunk: int | None = None,
    ):
        """Check that everything fits together; compiles nothing.

        Args:
          model: its shape.
          params: the parameters as `TrainedModel.load` gives them, in float32 or the compute dtype.
          mesh: with fsdp=1.
          capacity: the most tokens of a row, prompt and continuation together. A rotary scaling that goes by the
            length of the sequence, "dynamic" or "longrope", takes this for it from the first token on, so that keys in
            the cache stay valid.
          attention: of which the strategy (for prompts), its options, the window, softcap and tiles count; the layout
            is striped. The ring by default.
          sampling: how tokens are chosen; the likeliest by default.
          vocab_size: the tokenizer's: tokens from there on never come. The model's by default.
          chunk: tokens of a prompt that are read at once, rounded up to a multiple of sp; the tokens that come are the
            same. Weights then stay where they are, no strategy is used, and the memory that reading takes is that of
            one chunk, however long the prompt. All of it at once by default.

        Raises:
          ValueError: for what does not fit.
        """
        self._plan = make_plan(
            model, mesh, capacity=capacity, attention=attention, sampling=sampling, vocab_size=vocab_size, chunk=chunk
        )
        self._params, self._mesh = _placed(params, self._plan.model, mesh), mesh
        self._layout = SequenceLayout("striped", mesh.shape[SEQUENCE])
        self._chunk = None if chunk is None else self._layout.padded_length(chunk)
        self.extend_program = functools.lru_cache(maxsize=16)(self._compile_extend)
        self.prefill_program = functools.lru_cache(maxsize=16)(self._compile_prefill)
        self.step_program = functools.lru_cache(maxsize=16)(self._compile_step)

    @staticmethod
    def of(trained: TrainedModel, *, mesh: Mesh, capacity: int, **others) -> "Generator":
        """Make the generator of a trained model, parameters in the compute dtype; `others` as for `Generator`."""
        model, settings = trained.config.model, {"capacity": capacity, "attention": trained.config.attention} | others
        make_plan(model, mesh, **settings)  # what does not fit is said before anything is read
        return Generator(model, trained.load(mesh, dtype=model.compute_dtype), mesh=mesh, **settings)

    @property
    def slots(self) -> int:
        """Number of tokens of a row that a device has room for, in layers that see all of them."""
        return self._layout.padded_length(self._plan.capacity) // self._layout.ring_size

    def cache_bytes(self, rows: int) -> int:
        """Return the bytes of a device's share of the cache for so many rows."""
        return sum(self.cache_bytes_by_run(rows).values())

    def cache_bytes_by_run(self, rows: int) -> dict[str, int]:
        """Return the bytes of a device's share for so many rows, of each run of `ModelConfig.loop` by name."""
        plan, shape = self._plan, self._mesh.shape
        sizes = (self._padded_rows(rows) // shape[DATA], plan.capacity, shape[SEQUENCE], shape[TENSOR])
        return {name: cache_bytes(plan.model, run, *sizes) for name, run in plan.runs.items()}

    def compile(self, prompts: Sequence[np.ndarray]) -> None:
        """Compile what `generate` needs for prompts of these lengths and this number, so that it need not."""
        rows = self._padded_rows(len(prompts))
        if self._chunk is None:
            self.prefill_program(rows, self._padded_prompt(max(map(len, prompts), default=1)))
        else:
            self.extend_program(rows)
        self.step_program(rows)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        stop: Sequence[int] = (),
        seeds: int | Sequence[int] = 0,
    ) -> Iterator[list[int | None]]:
        """Continue prompts, and yield the next token of each, step by step, until all have ended.

        Args:
          prompts: integers [tokens], of any lengths, at least one token each.
          max_new_tokens: the most that a row gets.
          stop: tokens that end a row; they are yielded, too.
          seeds: one for each row; a number n stands for n, n+1, n+2, ... A row's draws depend on its seed and on
            positions alone.

        Yields:
          A token for each row, None for those that have ended.

        Raises:
          ValueError: for prompts that do not fit.
        """
        prompts = [np.asarray(prompt) for prompt in prompts]
        self._check_prompts(prompts, max_new_tokens)
        return self._run(prompts, max_new_tokens, frozenset(stop), _seeds(seeds, len(prompts)))

    def _run(self, prompts, max_new_tokens: int, stop: frozenset[int], seeds) -> Iterator[list[int | None]]:
        cache, rows = self._prefill(prompts, seeds)
        step, going = self.step_program(rows.tokens.shape[0]), [True] * len(prompts)
        for number in range(max_new_tokens):
            newest = rows.tokens
            if number + 1 < max_new_tokens:  # ahead of the host, which reads and shows the token meanwhile
                newest = newest.copy()  # the step takes the buffer
                cache, rows = step(self._params, cache, rows)
            tokens = np.asarray(newest)[: len(prompts)].tolist()
            yield [token if goes else None for token, goes in zip(tokens, going, strict=True)]
            going = [goes and token not in stop for token, goes in zip(tokens, going, strict=True)]
            if not any(going):
                return

    def _prefill(self, prompts: list[np.ndarray], seeds: np.ndarray):
        """Return (cache, rows) after the prompts, each padded at its end; rows that only fill up dp hold one token."""
        lengths = np.ones(self._padded_rows(len(prompts)), np.int32)
        lengths[: len(prompts)] = [prompt.size for prompt in prompts]
        if self._chunk is not None:
            return self._prefill_by_chunks(prompts, lengths, np.resize(seeds, lengths.size), self._chunk)
        tokens = np.zeros((lengths.size, self._padded_prompt(lengths.max())), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: prompt.size] = prompt
        by_token = NamedSharding(self._mesh, PartitionSpec(DATA, SEQUENCE))
        by_row = NamedSharding(self._mesh, ROWS)
        tokens = jax.device_put(self._layout.permute(tokens, 1), by_token)
        lengths, seeds = jax.device_put((lengths, np.resize(seeds, lengths.size)), by_row)
        return self.prefill_program(*tokens.shape)(self._params, tokens, lengths, seeds)

    def _prefill_by_chunks(self, prompts: list[np.ndarray], lengths: np.ndarray, seeds: np.ndarray, chunk: int):
        """Return what `_prefill` does, from one chunk of the prompts after the other."""
        tokens = np.zeros((lengths.size, -(-int(lengths.max()) // chunk) * chunk), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: prompt.size] = prompt
        by_row = NamedSharding(self._mesh, ROWS)
        rows = Rows(*jax.device_put((np.zeros_like(lengths), lengths, seeds), by_row))
        cache, extend = make_cache(self._plan, self._mesh, lengths.size)(), self.extend_program(lengths.size)
        for first in range(0, tokens.shape[1], chunk):
            piece = jax.device_put(tokens[:, first : first + chunk], by_row)
            cache, rows = extend(self._params, cache, rows, piece, np.int32(first))
        return cache, rows

    def _compile_prefill(self, rows: int, tokens: int) -> jax.stages.Compiled:
        prompts = self._abstract((rows, tokens), np.int32, PartitionSpec(DATA, SEQUENCE))
        by_row = (self._abstract((rows,), dtype, ROWS) for dtype in (np.int32, np.uint32))
        return make_prefill(self._plan, self._mesh).lower(self._params, prompts, *by_row).compile()

    def _compile_step(self, rows: int) -> jax.stages.Compiled:
        step = make_step(self._plan, self._mesh)
        return step.lower(self._params, *self._abstract_state(rows)).compile()

    def _compile_extend(self, rows: int) -> jax.stages.Compiled:
        pieces = self._abstract((rows, self._chunk), np.int32, ROWS)
        first = self._abstract((), np.int32, PartitionSpec())
        extend = make_extend(self._plan, self._mesh)
        return extend.lower(self._params, *self._abstract_state(rows), pieces, first).compile()

    def _abstract_state(self, rows: int) -> tuple[dict[str, KeyValueCache], Rows]:
        """Return shapes of the cache and of its rows."""
        caches = jax.eval_shape(make_cache(self._plan, self._mesh, rows))
        caches = jax.tree.map(lambda x: self._abstract(x.shape, x.dtype, CACHE_SPEC), caches)
        return caches, Rows(*(self._abstract((rows,), dtype, ROWS) for dtype in (np.int32, np.int32, np.uint32)))

    def _abstract(self, shape: tuple[int, ...], dtype, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, spec))

    def _padded_rows(self, rows: int) -> int:
        return -(-rows // self._mesh.shape[DATA]) * self._mesh.shape[DATA]

    def _padded_prompt(self, tokens: int) -> int:
        """Return one of the lengths that prompts are padded to, no longer than the cache."""
        grain = max(1, 2 ** (int(tokens) - 1).bit_length() // (2 * PROMPT_STEPS))
        return min(self._layout.padded_length(-(-int(tokens) // grain) * grain), self.slots * self._layout.ring_size)

    def _check_prompts(self, prompts: list[np.ndarray], max_new_tokens: int) -> None:
        """Raise ValueError unless the rows fit the cache."""
        require(len(prompts) > 0, "got no prompts, need at least one; give a list of arrays of tokens")
        fits = is_whole(max_new_tokens, 1)
        require(fits, f"max_new_tokens={shown(max_new_tokens)} must be a whole number, 1 or more; give at least 1")
        for number, prompt in enumerate(prompts):
            name = f"prompts[{number}]"
            require(prompt.size > 0, f"{name} is empty, need at least one token; open it with the document_start token")
            require_integers(name, prompt, (None,), "T", least=0, most=self._plan.model.vocab_size - 1)
        longest, capacity = max(prompt.size for prompt in prompts), self._plan.capacity
        require(
            longest + max_new_tokens <= capacity,
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} do not fit capacity={capacity}; "
            f"use capacity={longest + max_new_tokens} or fewer new tokens",
        )


def _seeds(seeds: int | Sequence[int], rows: int) -> np.ndarray:
    """Return the seed of each row, uint32 [rows]."""
    given = [(seeds + row) % 2**32 for row in range(rows)] if is_whole(seeds, 0) else seeds
    fits = isinstance(given, Sequence) and len(given) == rows and all(is_whole(s, 0) and s < 2**32 for s in given)
    require(fits, f"seeds={shown(seeds)} must be a number from 0 to 2**32-1, or one for each of {rows} rows; use 0")
    return np.array(given, np.uint32)


def _placed(params: Any, model: ModelConfig, mesh: Mesh) -> Any:
    """Put the parameters where the programs want them; ValueError unless they are this model's."""

    def same(want):
        shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]  # noqa: E731
        return jax.tree.structure(params) == jax.tree.structure(want) and shapes(params) == shapes(want)

    stored = same(abstract_parameters(model, mesh.shape))
    require(
        stored or same(abstract_parameters(model)),
        "params are those of another model: names or shapes differ; load them with TrainedModel.load",
    )
    params = params if stored else resized_parameters(params, model, mesh.shape)
    return jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(model)))
