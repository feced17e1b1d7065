"""The one place that words errors: what was wrong, what it got, what it needs, what to do about it.

Every check runs on static facts (shapes, dtypes, names, config values), so that a mistake costs no compilation.
"""

import argparse
import importlib.util
import numbers
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

_LONGEST = 500  # characters of a value that a message shows
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: `Path` makes one of two
TRAIN_MODULES = (
    *("absl", "flax", "grain", "matplotlib", "ml_collections", "optax", "orbax", "rich", "safetensors"),
    *("tensorboardX", "tokenizers"),
)
"""What the extra `train` of setup.py installs, as it is imported."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _LONGEST
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 20


class ConfigError(ValueError):
    """A config field or flag that cannot work. Its message is one line: field, value, need, remedy."""


def shown(value: object) -> str:
    """Return `value` as a message shows it: its repr in one line, shortened where it is long or deep."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes out no integer of more than 4300 digits
        return f"a {type(value).__name__} of more than 4300 digits"
    return text if text.isprintable() else one_line(text)


def printable(name: str) -> str:
    """Return the name of a file or field as a message shows it: escaped if it holds line breaks or the like."""
    return name if name.isprintable() else ascii(name)


def one_line(error: object) -> str:
    """Return what `error` says, without line breaks."""
    return " ".join(str(error).split())


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`; the message says got, need and remedy."""
    if not condition:
        raise ValueError(message)


def require_train(room: str) -> None:
    """Raise ModuleNotFoundError if what the extra `train` installs is not there, which `room` needs.

    The attention alone installs little. An import that fails in its middle would not say how to get the rest. Unlike
    Python's own, this error has no `name`, by which commands know that its words are meant for people.
    """
    missing = [module for module in TRAIN_MODULES if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{room} needs {', '.join(missing)}, not installed; pip install 'ring_attention[train]', or in a checkout "
            "pip install -e '.[train]'"
        )


def require_field(condition: bool, field: str, value: object, need: str, remedy: str) -> None:
    """Raise ConfigError naming `field` and `value` unless `condition`."""
    if not condition:
        raise ConfigError(f"{field}={shown(value)}: {need}; {remedy}")


def require_local(field: str, path: object) -> None:
    """Raise ConfigError naming `field` if `path` is the address of a bucket or the like; only files are read here."""
    found = _URL.match(str(path).strip())
    remedy = "mount it (gcsfuse, mount-s3) or copy it here, and give the path of that"
    kind = f"begins with {found[0]!r}" if found else ""
    require_field(found is None, field, str(path), f"{kind} and is no path of this machine, need one", remedy)


def local_path(text: str) -> Path:
    """Return `text` as a path, for argparse; ArgumentTypeError if it is the address of a bucket or the like."""
    try:
        require_local("path", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("path=")) from error
    return Path(text)


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    choices = sorted(choices)
    known = isinstance(value, str) and value in choices
    require(known, f"{name}={shown(value)} is not known; choose one of {', '.join(map(repr, choices))}")


def is_whole(value: object, least: int) -> bool:
    """Return whether `value` is a whole number, which True is not, and no smaller than `least`."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: Any) -> bool:
    """Return whether `value` is one real number that is known now: no text, nothing that JAX is still tracing."""
    try:
        float(value)
    except (TypeError, ValueError):  # of tracers too
        return False
    return not isinstance(value, str | bytes)


def require_divisible(name: str, value: int, by_name: str, by: int, remedy: str) -> None:
    """Raise ValueError unless `by` divides `value`."""
    require(value % by == 0, f"{name}={value} is not divisible by {by_name}={by}; {remedy}")


def require_shape(
    name: str,
    got: tuple[int, ...],
    need: tuple[int | None, ...],
    letters: str,
    remedy: str = "reshape or transpose it before the call",
) -> None:
    """Raise ValueError unless `got` matches `need` (None matches any size). `letters` name the axes, as in "BTHD"."""
    matches = len(got) == len(need) and all(n is None or g == n for g, n in zip(got, need, strict=True))
    wanted = ", ".join(f"{letter}={'any' if n is None else n}" for letter, n in zip(letters, need, strict=True))
    require(matches, f"{name} has shape {tuple(got)}, need [{wanted}]; {remedy}")


def require_array(name: str, x: object) -> None:
    """Raise ValueError unless `x` is an array."""
    is_array = hasattr(x, "shape") and hasattr(x, "dtype")
    require(is_array, f"{name} is {shown(x)}, need an array; wrap it in jnp.asarray")


def require_integers(
    name: str, x, need: tuple[int | None, ...], letters: str, *, least: int = -(2**31), most: int = 2**31 - 1
) -> None:
    """Raise ValueError unless `x` is an array of integers of this shape, from `least` to `most`.

    Values are looked at only where that costs nothing: in NumPy arrays, which are also those that may hold more bits
    than a device does.
    """
    require_array(name, x)
    require_shape(name, x.shape, need, letters)
    dtype = x.dtype
    require(getattr(dtype, "kind", "") in "iu", f"{name} has dtype {dtype}, need integers; cast it to int32")
    if isinstance(x, np.ndarray) and x.size:
        low, high = int(x.min()), int(x.max())
        got = f"{name} holds {low if low < least else high}"
        require(least <= low and high <= most, f"{got}, need {least} to {most}; count from 0 in each sequence")


def require_attention_shapes(q, k, v) -> None:
    """Raise ValueError unless q is [B,T,H,D], k [B,S,K,D] and v [B,S,K,D_v] with the same B, and K divides H."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_array(name, x)
    axes = "need 4: [batch, tokens, heads, head_dim]; reshape it before the call"
    require(q.ndim == 4, f"q has {q.ndim} axes with shape {q.shape}, {axes}")
    B, _, H, D = q.shape
    require_shape("k", k.shape, (B, None, None, D), "BSKD")
    require_shape("v", v.shape, (*k.shape[:3], None), "BSKD")
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(0 not in x.shape, f"{name} has shape {x.shape}, need at least 1 of everything; leave out empty batches")
    K, remedy = k.shape[2], "repeat heads of k and v, or use others"
    require(H % K == 0, f"q has H={H} heads and k has K={K}; K must divide H (grouped queries); {remedy}")


def require_same_head_dim(where: str, k, v) -> None:
    """Raise ValueError unless values are as wide as keys, for `where`, which cannot do others."""
    require(
        k.shape[-1] == v.shape[-1],
        f"v has head_dim {v.shape[-1:]} and k {k.shape[-1:]}, {where} needs the same; pad the narrower with zeros, "
        "give scale= of the width that the keys had, and cut the output to that of the values",
    )


def require_attention_dtypes(q, k, v) -> None:
    """Raise ValueError unless q, k and v share one dtype that accelerators multiply."""
    dtypes = [str(x.dtype) for x in (q, k, v)]
    require(
        len(set(dtypes)) == 1, f"q, k and v have dtypes {', '.join(dtypes)}; cast them to one dtype before the call"
    )
    require(
        dtypes[0] in ("float32", "bfloat16", "float16"),
        f"q has dtype {dtypes[0]}, need float32, bfloat16 or float16; cast q, k and v",
    )
