"""Mutations that a stranger could have made of a folder: of JSON, of bytes, of what a file is, of names.

Each is `mutate(rng, path)`, in place, and returns what it did in a few words. `rng` is a `random.Random`.
"""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

VALUES = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-308),
    *(float("nan"), float("inf"), "", "x", "../../x", "/tmp/escaped", "..", ".", "a/../../x", "a" * 300, "\0"),
    *("\ud800", "two\nlines", [], [1], ["../x"], [[]], [None], {}, {"a": {"b": "../../x"}}, {"": 0}),
]
NAMES = ["new", "../../x", "", "a" * 300, "\ud800", "two\nlines", "__metadata__", "rope_scaling", "head_dim"]


def places(value, path=()):
    """Every path to a value within nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def mutate_values(rng, values):
    """Change one value of what JSON held; returns (values, words)."""
    path = rng.choice(places(values))
    new = rng.choice(VALUES)
    if not path:
        return (new, f"all = {new!r:.40}") if rng.random() < 0.1 else add_key(rng, values, new)
    holder = values
    for key in path[:-1]:
        holder = holder[key]
    words = f"{'.'.join(map(str, path)):.80}"
    kind = rng.random()
    if kind < 0.15:
        del holder[path[-1]]
        return values, f"{words} deleted"
    if kind < 0.3 and isinstance(holder[path[-1]], dict):
        return values, f"{words}: {add_key(rng, holder[path[-1]], new)[1]}"
    holder[path[-1]] = new
    return values, f"{words} = {new!r:.40}"


def add_key(rng, values, new):
    if not isinstance(values, dict):
        return new, f"all = {new!r:.40}"
    name = rng.choice(NAMES)
    values[name] = new
    return values, f"{name!r:.40} added = {new!r:.40}"


def mutate_json(rng, path):
    """Change one value of a file of JSON."""
    values, words = mutate_values(rng, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(values), encoding="utf-8")
    return f"{path.name}: {words}"


def mutate_header(rng, path):
    """Change one value of a safetensors header, whose length is then right."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    values, words = mutate_values(rng, json.loads(raw[8 : 8 + size]))
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    return f"{path.name}: header: {words}"


def mutate_length(rng, path):
    """Let a safetensors file claim another length of its header."""
    size = rng.choice([0, 1, 8, 2**20, 10**8, 2**31, 2**60, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    return f"{path.name}: a header of {size:,} bytes"


def mutate_bytes(rng, path):
    """Cut a file, or change, insert or repeat bytes of it."""
    raw = bytearray(path.read_bytes())
    at, kind = rng.randrange(len(raw) + 1), rng.randrange(6)
    if kind == 0:
        raw = raw[:at]
    elif kind == 1:
        raw[at:at] = rng.randbytes(rng.choice([1, 8, 1000]))
    elif kind == 2:
        raw = bytearray(b"[" * 100_000)
    elif kind == 3:
        raw = bytearray(b"\xef\xbb\xbf") + raw
    elif kind == 4:
        raw = raw + raw
    elif raw:
        for _ in range(rng.choice([1, 10])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    path.write_bytes(raw)
    return f"{path.name}: bytes, way {kind}"


def mutate_kind(rng, path):
    """Put something else in the place of a file."""
    path.unlink()
    kind = rng.choice(["nothing", "pipe", "folder", "broken link", "link to itself", "/dev/zero", "empty", "long link"])
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "broken link":
            path.symlink_to("nowhere")
        case "link to itself":
            path.symlink_to(path.name)
        case "/dev/zero":
            path.symlink_to(kind)
        case "long link":
            path.symlink_to("a" * 300)
        case "empty":
            path.write_bytes(b"")
    return f"{path.name}: {kind}"


def add_beside(rng, path):
    """Put something beside a file that nobody asked for."""
    name = rng.choice(["x.txt", "b" * 255, "two\nlines", "\udcff", "pytorch_model.bin", "é", "a b"])
    path = path.parent / name
    if rng.random() < 0.3:
        path.write_bytes(b"mine")
        return f"a file {name!r:.20}"
    path.write_bytes(b"")
    return "beside: " + mutate_kind(rng, path)


def any_of(rng, folder, mutations):
    """Apply one of `mutations`, [(glob, mutate)], to one of the files below `folder` that it is for."""
    glob, mutate = rng.choice(mutations)
    try:
        fits = [path for path in folder.glob(glob) if os.path.isfile(path) and not path.is_symlink()]
    except OSError:  # a link that is too long was put there before
        fits = []
    if not fits:
        return "nothing more"
    # Orbax draws the names of its files: their sizes are the same each time, so that a seed means the same file.
    path = rng.choice(sorted(fits, key=lambda path: (path.parent, path.stat().st_size, path)))
    try:
        return mutate(rng, path)
    except (ValueError, TypeError, RecursionError, struct.error):  # it was changed before, and is no JSON any more
        return mutate_bytes(rng, path)


def sign_again(folder: Path):
    """Let the digests of a manifest be those of the files: what a stranger would do."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():  # a pipe would wait for somebody to write into it
        return
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        digests = values["digests"]
        for name in digests:
            raw = (folder / name).read_bytes() if (folder / name).is_file() else b""
            digests[name] = hashlib.blake2b(raw).hexdigest()[:32]
        manifest.write_text(json.dumps(values), encoding="utf-8")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # the manifest is what was changed


def copy(folder, target):
    shutil.copytree(folder, target, symlinks=True)
    return target
