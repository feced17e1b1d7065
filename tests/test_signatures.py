"""Signatures of the public functions: every argument is shown with its default, though most are declared once."""

import dataclasses
import inspect
import pydoc
import re
import typing

import pytest

import ring_attention as ra
from ring_attention.attention.mask_args import (
    MASK_DEFAULTS,
    OTHER_NAMES,
    MaskArgs,
    ScoreArgs,
    instead_of,
)
from ring_attention.parallel.context import ContextArgs, SequenceArgs
from ring_attention.parallel.shard import ShardArgs
from ring_attention.parallel.strategies import StrategyOptions

SCORES = dict(window=None, softcap=None, scale=None, sinks=None, alibi_slopes=None, extra_mask=None)
OF_TOKENS = dict(segment_ids=None, intervals=None, kv_valid=None, kv_lengths=None, kv_bias=None)
MASK = SCORES | OF_TOKENS | dict(causal=True, dropout_rate=0.0, dropout_key=None)
LSE = dict(return_lse=False)
KERNEL = dict(impl="auto", block_sizes=None)
SHARDED = dict(axis_name="sp", layout="contiguous", positions=None, max_segment_len=None) | MASK | KERNEL
CROSS = dict(kv_layout=None, kv_positions=None, kv_segment_ids=None)
OFFSETS = dict(batch_offset=0, head_offset=0, seq_len=None, count_hops=True)
TOKENS = dict(kv_segment_ids=None, q_positions=None, kv_positions=None) | LSE
GLOBAL = dict(mesh=None, spec=None)
DROPOUT = ("dropout_rate", "dropout_key")
CACHE = SCORES | KERNEL | dict(axis_name="sp", heads_first=False, layout="striped")

ARGUMENTS = {
    "ring_attention": SHARDED | CROSS | LSE | GLOBAL | dict(duplex=False, unroll=False),
    "context_attention": SHARDED | CROSS | LSE | GLOBAL | dict(strategy="ring"),
    "ring_attention_shard": SHARDED | CROSS | LSE | OFFSETS,
    "context_attention_shard": SHARDED | CROSS | LSE | OFFSETS | dict(strategy="ring"),
    "flax_attention_fn": {
        name: x for name, x in (SHARDED | GLOBAL | dict(strategy="ring")).items() if name not in DROPOUT
    },
    "blockwise_attention": MASK | KERNEL | TOKENS,
    "reference_attention": MASK | TOKENS | dict(stride=None),
    "decode_attention": CACHE | GLOBAL,
    "decode_attention_shard": CACHE | dict(layer=None, slot_positions=None),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_signature_lists_every_argument_with_its_default(name):
    parameters = inspect.signature(getattr(ra, name)).parameters.values()
    shown = {x.name: x.default for x in parameters if x.kind is x.KEYWORD_ONLY and x.default is not x.empty}
    assert shown == ARGUMENTS[name]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_help_shows_every_argument(name):
    text = pydoc.render_doc(getattr(ra, name), renderer=pydoc.plaintext)
    assert [argument for argument in ARGUMENTS[name] if f"{argument}:" not in text and f"{argument}=" not in text] == []


def test_typed_dicts_name_what_the_functions_take():
    kinds = (ScoreArgs, MaskArgs, SequenceArgs, ContextArgs, ShardArgs)
    keys = {kind: set(typing.get_type_hints(kind)) for kind in kinds}
    options = set(typing.get_type_hints(StrategyOptions))
    assert keys[ScoreArgs] == set(SCORES)
    assert keys[MaskArgs] == set(MASK) == set(MASK_DEFAULTS)
    assert keys[SequenceArgs] == set(SHARDED | CROSS | LSE) | {"spec"}
    assert keys[ContextArgs] == set(SHARDED | CROSS | LSE) | {"spec", "strategy"} | options
    assert keys[ShardArgs] == set(SHARDED | CROSS | LSE) | set(OFFSETS) | options


def test_typed_options_are_those_of_the_strategies():
    fields = {field.name for strategy in ra.STRATEGIES.values() for field in dataclasses.fields(strategy)}
    assert set(typing.get_type_hints(StrategyOptions)) == fields


@pytest.mark.parametrize("name", ["ring_attention", "blockwise_attention", "reference_attention", "decode_attention"])
def test_unknown_argument_is_refused_by_name(name):
    arguments = dict(lengths=None) if name == "decode_attention" else {}
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'wnidow'"):
        getattr(ra, name)(None, None, None, wnidow=3, **arguments)


ANSWERS = {  # what others call it -> what the answer names
    "mask": ("segment_ids=", "intervals=", "extra_mask="),
    "bias": ("kv_bias=", "alibi_slopes="),
    "key_value_seq_lengths": ("kv_lengths=",),
    "return_residual": ("return_lse=",),
    "local_window_size": ("window=(left, right)",),
    "key_padding_mask": ("kv_valid=",),
    "is_causal": ("causal=",),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_others_call_an_argument_is_answered_with_ours(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; ") as caught:
        ra.blockwise_attention(None, None, None, **{name: None})
    assert [words for words in ANSWERS[name] if words not in str(caught.value)] == []


def test_answers_name_arguments_that_exist_and_no_question_is_one():
    parameters = inspect.signature(ra.blockwise_attention).parameters
    for name, words in OTHER_NAMES.items():
        named = re.findall(r"(\w+)=", words) or re.findall(r"(\w+_ids)", words)
        assert named, name
        assert [x for x in named if x not in parameters] == [], name
        assert name not in parameters
    assert "did you mean" not in instead_of("mask", ra.decode_attention)
    assert "extra_mask=" in instead_of("mask", ra.decode_attention)
    assert instead_of("key_padding_mask", ra.decode_attention) == ""  # which has no kv_valid
