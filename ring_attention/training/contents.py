"""What a run reads, in digests: documents and tokenizer whose contents changed under the same names are noticed."""

import hashlib
import json
from pathlib import Path

from ring_attention.checks import ConfigError
from ring_attention.data.tokenizers import BYTES
from ring_attention.training.config import DataConfig
from ring_attention.training.corpus import Corpus
from ring_attention.training.processes import is_first
from ring_attention.training.run_folder import RunFolder

DIGESTS = "contents.json"
"""In the run's folder."""


def digests(config: DataConfig, corpus: Corpus) -> dict[str, str]:
    """Field -> digest of what it stands for: of the documents on either side of the split, and of the tokenizer."""
    return {
        "data.paths (training documents)": f"{len(corpus.train):,} with digest {corpus.train.digest()}",
        "data.paths (held-out documents)": f"{len(corpus.held_out):,} with digest {corpus.held_out.digest()}",
        "data.tokenizer": f"digest {_tokenizer_digest(config.tokenizer)}",
    }


def require_same_contents(folder: RunFolder, now: dict[str, str], *, has_begun: bool) -> None:
    """Raise ConfigError unless a run that `has_begun` reads what it began with; one that begins writes that down.

    A folder from before there was such a file is believed, and gets one.
    """
    path = folder.path / DIGESTS
    before = _read(path) if has_begun and path.exists() else now
    for field, words in now.items():
        if before.get(field) != words:
            raise ConfigError(
                f"{field}: its contents are others ({words}) than those that the run in {folder.path} began with "
                f"({before.get(field)}); put those back, start another run with --config.run_dir=PATH, or go on with "
                f"the new ones by removing {path}"
            )
    if is_first():
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def _read(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not an object in JSON; remove it to go on without comparing contents")
    return values


def _tokenizer_digest(tokenizer: str) -> str:
    content = BYTES.encode() if tokenizer == BYTES else Path(tokenizer).read_bytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
