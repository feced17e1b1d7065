"""The cache of what self-tests found, a small file for each kernel, kind of device and set of versions.

The folder is `ring_attention` in $XDG_CACHE_HOME, or in ~/.cache where that is not set. A folder that cannot be read or
written is no failure: the test is then done in every process.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from pathlib import Path

import jax

_log = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "libtpu", "tokamax", *(f"jax-cuda{n}-{x}" for n in (12, 13) for x in ("plugin", "pjrt")))
_CUDNN = tuple(f"nvidia-cudnn-cu{n}" for n in (12, 13))


def key_of(kernel: str, device: jax.Device) -> dict[str, str]:
    """What a verdict holds for: the kernel, the kind of device, all versions, and the text of the adapters here."""
    versions = {name: _version(name) for name in (*_PACKAGES, *_CUDNN)}
    platform = str(getattr(device.client, "platform_version", ""))
    text = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text.update(path.read_bytes())
    return {
        "kernel": kernel,
        "device": device.device_kind,
        "platform": platform,
        "adapters": text.hexdigest(),
    } | versions


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def path_of(key: dict[str, str]) -> Path:
    """The file that holds the verdict for this key, if there is one."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(folder, "ring_attention", f"self_test-{key['kernel']}-{digest[:16]}.json")


def read(key: dict[str, str]) -> str | None:
    """The verdict for this key, "" for a kernel that passed; None if none can be read."""
    try:
        kept = json.loads(path_of(key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(kept, dict) and kept.get("key") == key and isinstance(kept.get("difference"), str)
    return kept["difference"] if fits else None


def write(key: dict[str, str], difference: str) -> None:
    """Keep a verdict, in one step, so that no other process reads half of it."""
    path = path_of(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".self_test-")
        with open(handle, "w", encoding="utf-8") as file:
            json.dump({"key": key, "difference": difference}, file, indent=1)
        os.replace(name, path)
    except OSError as error:
        _log.info("attention kernel: the verdict of the self-test is not kept: %s", error)
