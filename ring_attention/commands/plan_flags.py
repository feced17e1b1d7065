"""What a command line of plan.py says beside the flags of argparse: the model, its tokens, the network."""

import dataclasses
import re

from ring_attention.checks import ConfigError, printable, require_field, shown
from ring_attention.hardware.topology import Topology

_TOKENS = re.compile(r"(\d+|\d+\.\d+)([KM]?)")
_TIMES = {"": 1, "K": 2**10, "M": 2**20}
_BANDWIDTH = re.compile(r"(\d+|\d+\.\d+)([GM])([bB])(?:/s|ps)?")
_UNITS = {"M": 1e6, "G": 1e9}


def parse_tokens(text: str) -> int:
    """Return a number of tokens: 131072, 128K (of 1024), 1M or 1.5M (of 1024 * 1024).

    Raises:
      ConfigError: for anything else, or what is not a whole number of tokens.
    """
    found = _TOKENS.fullmatch(text.replace("_", ""))
    tokens = float(found[1]) * _TIMES[found[2]] if found else 0
    need = "must be a positive whole number of tokens, K for 1024 and M for 1024 * 1024 of them"
    require_field(tokens >= 1 and tokens % 1 == 0, "--tokens", text, need, "write it like 131072, 128K or 1.5M")
    return int(tokens)


def parse_bandwidth(text: str) -> float:
    """Return bytes a second: of 400Gb, bits, or 50GB, bytes; G and M are powers of ten. Raises ConfigError."""
    found = _BANDWIDTH.fullmatch(text)
    value = float(found[1]) * _UNITS[found[2]] / (8 if found[3] == "b" else 1) if found else 0
    need = "must be what one device has of its host's network one way, in bits (b) or bytes (B) a second"
    require_field(value > 0, "--network", text, need, "write it like 400Gb or 50GB")
    return value


def with_network(topology: Topology, text: str) -> Topology:
    """Return the pod with another network between its hosts or slices; ConfigError where nothing would cross it."""
    value = parse_bandwidth(text)
    require_field(
        topology.devices > topology.domain,
        "--network",
        text,
        f"{topology.name} has no network between its devices to plan with",
        "leave it out, or name a pod of several hosts such as h100:4x8",
    )
    sources = topology.chip.sources | {"network": f"--network={text}"}
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, network=value, sources=sources))


def split_model(argv: list[str], switches: set[str]) -> tuple[str | None, list[str]]:
    """Return the word of the command line that stands for itself, the model, and all others.

    Args:
      argv: the command line.
      switches: flags that take no value, so that a word behind one of them stands for itself.

    Raises:
      ConfigError: for a second such word, or one beside --config.
    """
    words, rest = [], []
    for before, word in zip(["", *argv], argv, strict=False):
        value = before.startswith("-") and "=" not in before and f"--{before[2:].replace('-', '_')}" not in switches
        (rest if word.startswith("-") or value else words).append(word)
    if len(words) > 1:
        raise ConfigError(f"{shown(words[1])}: one model is planned, {shown(words[0])} is named already; leave one out")
    named = [word for word in rest if word == "--config" or word.startswith(("--config=", "-config="))]
    if words and named:
        raise ConfigError(f"{printable(named[0])}: {shown(words[0])} names the model already; leave one out")
    return (words[0] if words else None), rest


def config_flags(model: str | None, tokens: str | None, flags: list[str]) -> list[str]:
    """Return the flags of the config for what the command line says.

    Held-out sequences have nothing to do with planning: as many are measured as a step has, where nobody says.

    Raises:
      ConfigError: where tokens are given twice.
    """
    told = [*([f"--config={model}"] if model else []), *flags]
    if tokens is not None:
        twice = next((flag for flag in flags if flag.lstrip("-").partition("=")[0] == "config.seq_len"), None)
        if twice:
            raise ConfigError(f"{printable(twice)}: --tokens={tokens} says how long a sequence is; leave one out")
        told.append(f"--config.seq_len={parse_tokens(tokens)}")
    values = {flag.lstrip("-").partition("=")[0]: flag.partition("=")[2] for flag in flags}
    if values.get("config.batch_size") and "config.eval_sequences" not in values:
        told.append(f"--config.eval_sequences={values['config.batch_size']}")
    return told
