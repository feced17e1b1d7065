"""Whether the arrays of a checkpoint are those of a state, however either was padded for its mesh."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ring_attention.checks import ConfigError


def require_fit(path: Path, stored: Any, wanted: Any, whole: Any = None) -> bool:
    """Return whether a checkpoint's arrays have the shapes of a state's, so that none need be cut or padded.

    Orbax would cast another dtype silently, and tell of another shape in pages.

    Args:
      path: of the checkpoint, for messages.
      stored, wanted: pytrees of what has shape and dtype.
      whole: the same without padding, whose shapes `stored` and `wanted` have to hold; None: they have no padding.

    Raises:
      ConfigError: unless the checkpoint holds just the arrays of the state.
    """
    stored, wanted = _described(stored), _described(wanted)
    least = wanted if whole is None else _described(whole)
    for name in sorted(stored.keys() | wanted.keys()):
        got, need = stored.get(name), wanted.get(name)
        if got is None or need is None or not (got == need or _holds(got, least[name]) and _holds(need, least[name])):
            remedy = "go on with the model and optimizer that wrote it, or start another run"
            words = [f"{kind[0]}{list(kind[1])}" if kind else "absent" for kind in (got, need)]
            raise ConfigError(f"{path}: {name} is {words[0]}, this run needs {words[1]}; {remedy}")
    return stored == wanted


def _holds(kind: tuple[str, tuple[int, ...]], least: tuple[str, tuple[int, ...]]) -> bool:
    """Return whether an array of this dtype and shape is one of the dtype and shape `least`, perhaps with padding."""
    (dtype, shape), (need, sizes) = kind, least
    return dtype == need and len(shape) == len(sizes) and all(a >= b for a, b in zip(shape, sizes, strict=True))


def _described(tree: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every array, by dotted name; random keys count as the integers they are made of."""
    kinds = {}
    for path, leaf in ocp.tree.to_flat_dict(tree).items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        kinds[".".join(path)] = jnp.dtype(leaf.dtype).name, tuple(leaf.shape)
    return kinds
