"""Words of plan.py's own command line as numbers."""

import pytest

from ring_attention.checks import ConfigError
from ring_attention.commands.plan_flags import parse_bandwidth, parse_tokens, split_model


@pytest.mark.parametrize(
    ("text", "tokens"), [("1M", 2**20), ("1.5M", 1_572_864), ("128K", 131_072), ("1_000_000", 10**6), ("7", 7)]
)
def test_tokens_are_counted_in_powers_of_two(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "M", "-1K", "1.3", "1e6", "1m", "1 M", "1.0001K"])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(ConfigError, match="--tokens="):
        parse_tokens(text)


@pytest.mark.parametrize(("text", "rate"), [("400Gb", 50e9), ("50GB", 50e9), ("12.5Gb/s", 1.5625e9), ("800Mb", 1e8)])
def test_bits_are_b_and_bytes_are_capital(text, rate):
    assert parse_bandwidth(text) == rate


@pytest.mark.parametrize("text", ["400", "400gb", "0Gb", "fast", "-1Gb", "1TB"])
def test_what_is_no_bandwidth_is_refused(text):
    with pytest.raises(ConfigError, match="--network="):
        parse_bandwidth(text)


@pytest.mark.parametrize(
    ("argv", "model"),
    [
        (["x", "--topology=v5e:2x4"], "x"),
        (["--topology", "v5e:2x4", "x"], "x"),
        (["--compile", "x"], "x"),
        (["--config.model.num_layers", "4"], None),
        ([], None),
    ],
)
def test_the_word_that_stands_for_itself_is_the_model(argv, model):
    found, rest = split_model(argv, {"--compile"})
    assert found == model
    assert rest == [word for word in argv if word != "x"]
