"""Configs at random: whatever is in them, there is a TrainConfig or one line that says what is wrong."""

import copy
import pathlib
from dataclasses import is_dataclass
from typing import get_args

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ring_attention.checks import ConfigError
from ring_attention.parallel.layouts import LAYOUT_KINDS
from ring_attention.parallel.strategies import STRATEGIES
from ring_attention.training.config import TrainConfig
from ring_attention.training.config_values import config_from_dict, config_to_dict, field_kinds, is_list
from ring_attention.training.flags import load_config, parse_config
from ring_attention.training.validate import validate_config

TINY = pathlib.Path(__file__).parent.parent.parent / "configs" / "tiny.py"
FIELDS = sorted(field_kinds())
SIZES = ("model.", "mesh.", "attention.", "seq_len", "batch_size", "eval_sequences", "optimizer.accumulation_steps")

KNOWN_WORDS = [
    *STRATEGIES,
    *LAYOUT_KINDS,
    "xla",
    "splash",
    "cudnn",
    "auto",
    "bfloat16",
    "offload",
    "skip",
    "bytes",
    "1 2",
]
WHOLE = st.one_of(st.sampled_from([1, 2, 4, 8, 64, 256]), st.integers(-3, 40), st.integers(), st.just(2**31))
NUMBERS = st.one_of(st.floats(), st.floats(0, 1), WHOLE)
WORDS = st.one_of(st.sampled_from(KNOWN_WORDS), st.text(max_size=8))
OF_KIND = {int: WHOLE, float: NUMBERS, str: WORDS, bool: st.booleans()}
LAYERS = st.fixed_dictionaries(
    {},
    optional=dict(window=WHOLE, chunk=WHOLE, sinks=st.booleans(), softcap=NUMBERS, local=st.booleans(), rope=st.none()),
)


def of_kind(kind, simple=OF_KIND):
    """Values of a declared type; of a list of layers, layers."""
    return (
        st.lists(LAYERS if is_dataclass(get_args(kind)[0]) else NUMBERS, max_size=3) if is_list(kind) else simple[kind]
    )


EXTREME = st.sampled_from([10**400, -(2**63), 2**64, float("nan"), float("inf"), "x" * 10**5, "a\nb", "\0", "\ud800"])
OBJECTS = st.sampled_from([None, (), b"4", 4j, object(), int, np.zeros((3, 3)), np.int64(4), np.float32(0.5)])
ANYTHING = st.one_of(WHOLE, NUMBERS, WORDS, EXTREME, OBJECTS, st.lists(st.integers(), max_size=3))


def names():
    """Names of fields and sections, nearly such, and others."""
    sections = sorted({field.rpartition(".")[0] for field in FIELDS} - {""})
    return st.one_of(st.sampled_from([*FIELDS, *sections]), st.sampled_from(FIELDS).map(lambda x: x[:-1]), st.text())


@st.composite
def changes(draw):
    """Fields with values, most of them of the declared kind."""
    kinds = field_kinds()
    chosen = draw(st.lists(st.sampled_from(FIELDS), max_size=6, unique=True))
    return {field: draw(of_kind(kinds[field]) if draw(st.integers(0, 9)) else ANYTHING) for field in chosen}


@st.composite
def sizes(draw):
    """Fields that decide what fits what, all of the declared kind."""
    kinds = field_kinds()
    chosen = draw(st.lists(st.sampled_from([field for field in FIELDS if field.startswith(SIZES)]), max_size=4))
    small = {int: st.sampled_from([1, 2, 3, 4, 8, 48, 256]), float: st.floats(0.1, 9), bool: st.booleans(), str: WORDS}
    return {field: draw(of_kind(kinds[field], small)) for field in chosen}


MESHES = st.fixed_dictionaries({axis: st.sampled_from([1, 2, 3, 4, 8, 256]) for axis in ("dp", "fsdp", "sp", "tp")})
PLATFORMS = st.sampled_from([None, "cpu", "gpu", "tpu"])
NESTED = st.recursive(ANYTHING, lambda inner: st.dictionaries(names(), inner, max_size=4), max_leaves=12)


def outcome(make, *arguments):
    """What `make` returns, or the line of its ConfigError; anything else that it raises is a failure."""
    try:
        return make(*arguments)
    except ConfigError as error:
        message = str(error)
    assert message.isprintable(), repr(message)
    assert len(message) < 4000
    assert "; " in message, message
    return message


def values_of_tiny():
    return flatten_dict(config_to_dict(load_config(TINY)), sep=".")


VALUES = values_of_tiny()


def examples(count):
    return settings(max_examples=count, deadline=None)


@examples(400)
@given(changes(), MESHES, PLATFORMS)
def test_config_with_changed_fields_fits_or_gives_one_line(changed, mesh, platform):
    config = outcome(config_from_dict, unflatten_dict(copy.copy(VALUES) | changed, sep="."))
    if isinstance(config, str):
        return
    assert config_from_dict(config_to_dict(config)) == config
    outcome(validate_config, config, mesh, platform)


@examples(400)
@given(sizes(), MESHES, PLATFORMS)
def test_config_with_any_sizes_fits_or_gives_one_line(changed, mesh, platform):
    config = outcome(config_from_dict, unflatten_dict(copy.copy(VALUES) | changed, sep="."))
    if isinstance(config, TrainConfig):
        outcome(validate_config, config, mesh, platform)


@examples(300)
@given(NESTED)
def test_config_from_dict_of_any_values_gives_one_line(values):
    assert isinstance(outcome(config_from_dict, values), str)


@st.composite
def arguments(draw):
    """A command line: flags with values, in one word or two, and what is none."""
    field, text = draw(names()), draw(st.one_of(NUMBERS.map(str), WORDS, st.sampled_from(["9" * 5000, "", "-", "="])))
    forms = [
        [f"--config.{field}={text}"],
        [f"--config.{field}", text],
        [f"-config.{field}={text}"],
        [text],
        [f"--{text}"],
    ]
    return draw(st.sampled_from(forms[:1] * 5 + forms))


@examples(150)
@given(st.lists(arguments(), max_size=5))
@example([["--config.attention.speeds=" + "9" * 5000]])
def test_command_line_of_any_words_gives_config_or_one_line(words):
    argv = [word for argument in words for word in argument]
    if not {"-h", "-help", "--help"} & set(argv):
        assert isinstance(outcome(parse_config, argv, str(TINY)), TrainConfig | str)


@pytest.mark.slow
@examples(3000)
@given(changes(), MESHES, PLATFORMS)
def test_config_with_changed_fields_fits_at_length(changed, mesh, platform):
    config = outcome(config_from_dict, unflatten_dict(copy.copy(VALUES) | changed, sep="."))
    if isinstance(config, TrainConfig):
        outcome(validate_config, config, mesh, platform)


def test_config_number_too_long_to_print_gives_one_line():
    value = 10**5000
    for field in ("seed", "optimizer.b1", "name", "mesh.spp", "mesh"):
        values = {name: kept for name, kept in VALUES.items() if not name.startswith(f"{field}.")}
        assert "a int of more than 4300 digits" in outcome(
            config_from_dict, unflatten_dict(values | {field: value}, sep=".")
        )


def test_config_unchanged_fits():
    config = outcome(config_from_dict, unflatten_dict(VALUES, sep="."))
    assert isinstance(config, TrainConfig)
    assert outcome(validate_config, config, dict(dp=1, fsdp=2, sp=2, tp=2), "cpu") is None


@pytest.mark.parametrize("message", ["two\nlines; here", "no remedy", "x" * 5000 + "; long"])
def test_outcome_sees_an_error_of_two_lines(message):
    def refuse():
        raise ConfigError(message)

    with pytest.raises(AssertionError):
        outcome(refuse)
