"""Files of JSON, for people and programs to read."""

import json
from pathlib import Path


def write_json(path: Path, value: object) -> None:
    """Write a value in one move, in a folder that is made if need be, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
