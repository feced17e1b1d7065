"""Which tokens stand around documents and prompts, by what a tokenizer and the files beside it say."""

import json
import re

import pytest
from small_tokenizers import write_tokenizer

from ring_attention.checks import ConfigError
from ring_attention.data.tokenizers import ByteTokenizer, load_tokenizer


@pytest.mark.parametrize(
    ("start", "others"),
    [
        ("<｜begin▁of▁sentence｜>", ["<｜end▁of▁sentence｜>"]),  # DeepSeek
        ("<|startoftext|>", ["<|endoftext|>"]),  # Yi
        ("<|im_start|>", ["<|endoftext|>", "<|im_end|>"]),  # SmolLM2
        ("<|begin_of_text|>", ["<|end_of_text|>"]),  # Llama 3
        ("<s>", ["</s>", "<|endoftext|>"]),
        ("<another>", ["<s>", "<bos>"]),
    ],
)
def test_documents_and_prompts_open_as_the_tokenizer_says(tmp_path, start, others):
    made, ours = write_tokenizer(tmp_path, [*others, start], before=[start])
    assert [ours.document_start, *ours.encode(b"hi")] == made.encode("hi", add_special_tokens=True).ids
    assert ours.prompt_start == (ours.document_start,)
    assert ours.document_start < ours.vocab_size == made.get_vocab_size()


def test_documents_open_with_the_separator_where_none_is_fed(tmp_path):
    """As for Qwen, whose config.json names <|endoftext|>, and whose instruct models end with another token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    about = dict(bos_token=None, eos_token="<|im_end|>", add_bos_token=True)
    made, ours = write_tokenizer(tmp_path, special, tokenizer_config=about, config=dict(bos_token_id=256))
    assert made.encode("hi", add_special_tokens=True).ids == [*b"hi"]
    assert (ours.prompt_start, ours.document_start, ours.document_end) == ((), 256, 258)
    assert ours.vocab_size == 259, "no id past the vocabulary"
    (tmp_path / "config.json").unlink()
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).document_start == 256


SPECIAL = ["<a>", "<b>", "<c>"]


@pytest.mark.parametrize(
    ("files", "start", "end"),
    [
        (dict(tokenizer_config=dict(bos_token="<a>", eos_token="<b>")), 256, 257),
        (dict(tokenizer_config=dict(bos_token={"content": "<b>"}, eos_token={"content": "<c>"})), 257, 258),
        (dict(special_tokens_map=dict(bos_token="<b>", eos_token="<a>")), 257, 256),
        (dict(config=dict(bos_token_id=258, eos_token_id=[256, 257])), 258, 256),
        (dict(config=dict(bos_token_id=258), generation_config=dict(eos_token_id=257)), 258, 257),
        (dict(tokenizer_config=dict(eos_token="<c>"), config=dict(bos_token_id=256, eos_token_id=257)), 256, 258),
        (dict(tokenizer_config=dict(eos_token="<nowhere>"), config=dict(eos_token_id=257)), 257, 257),
        (dict(tokenizer_config=dict(eos_token="<c>")), 258, 258),
        (dict(tokenizer_config=dict(bos_token="<c>")), 258, 258),
        (dict(config=dict(model_type="llama", bos_token_id=None)), 259, 259),
        (dict(config=dict(bos_token_id=300, eos_token_id=301)), 300, 301),
    ],
)
def test_find_borders_reads_files_beside_the_tokenizer(tmp_path, files, start, end):
    _, ours = write_tokenizer(tmp_path, SPECIAL, **files)
    assert (ours.document_start, ours.document_end) == (start, end)
    assert ours.vocab_size == max(259, start + 1, end + 1)
    assert ours.token_bytes([start, *b"text", end]) == b"text"


def test_find_borders_prefers_the_tokenizer_to_the_files(tmp_path):
    about = dict(bos_token="<b>", add_bos_token=False)
    _, ours = write_tokenizer(tmp_path, SPECIAL, before=["<a>"], after=["<c>"], tokenizer_config=about)
    assert (ours.prompt_start, ours.document_start, ours.document_end) == ((256,), 256, 258)


def test_in_words_says_a_new_id_past_the_vocabulary(tmp_path):
    _, ours = write_tokenizer(tmp_path, ["<pad>"])
    assert ours.document_start == ours.document_end == 257
    assert ours.in_words() == (
        "The tokenizer names no token for it: documents open with a new one, <257> (257), and end with <257> (257)."
    )
    _, ours = write_tokenizer(tmp_path, ["<s>", "</s>"], config=dict(eos_token_id=257))
    assert ours.in_words() == "Documents open with <s> (256), and end with </s> (257)."


@pytest.mark.parametrize("text", ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "answer</s>", "plain"])
def test_encode_gives_special_tokens_unless_told_not_to(tmp_path, text):
    made, ours = write_tokenizer(tmp_path, ["<|im_start|>", "<|im_end|>", "</s>"])
    want = made.encode(text, add_special_tokens=False).ids
    assert ours.encode(text.encode()).tolist() == want
    assert ours.encode(text.encode(), special_tokens=False).tolist() == [*text.encode()], "even after it was"
    assert ours.token_bytes(want) == text.encode()
    assert ByteTokenizer().encode(text.encode(), special_tokens=True).tolist() == [*text.encode()]


def test_encode_never_spells_an_end_that_is_ordinary(tmp_path):
    made, ours = write_tokenizer(tmp_path, added=["</s>"], tokenizer_config=dict(eos_token="</s>"))
    assert made.encode("</s>").ids == [ours.document_end] == [256]
    assert ours.encode(b"</s>", special_tokens=False).tolist() == [*b"</s>"]
    assert ours.encode(b"</s>", special_tokens=True).tolist() == [256]


@pytest.mark.parametrize(
    ("file", "contents", "words"),
    [
        ("config", "{", "config.json: is no JSON; copy it again"),
        ("config", "[" * 100_000, "config.json: is no JSON; copy it again"),
        ("config", "[1]", "config.json: holds no object with fields"),
        ("config", '{"eos_token_id": "</s>"}', "eos_token_id='</s>': need ids of tokens; mend"),
        ("config", '{"bos_token_id": -1}', "bos_token_id=-1: need ids"),
        ("config", '{"bos_token_id": 1e30}', "bos_token_id=1e+30: need ids"),
        ("config", '{"bos_token_id": 4294967296}', "bos_token_id=4294967296: need ids"),
        ("config", '{"bos_token_id": true}', "bos_token_id=True: need ids"),
        ("tokenizer_config", '{"bos_token": "\\ud800"}', "need the text of a token; mend"),
        ("tokenizer_config", '{"bos_token": 3}', "bos_token=3: need the text of a token"),
        ("tokenizer_config", '{"eos_token": {"content": [1]}}', "eos_token={'content': [1]}: need the text"),
    ],
)
def test_find_borders_refuses_bad_files_in_one_line(tmp_path, file, contents, words):
    write_tokenizer(tmp_path, SPECIAL)
    (tmp_path / f"{file}.json").write_text(contents)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"SpecialToken": {"id": "<a>", "type_id": 0}}, "leaves the text out; mend its template"),
        (None, "has the id 4,294,967,295, need less than 16,777,216"),
    ],
)
def test_find_borders_refuses_a_bad_post_processor(tmp_path, part, words):
    write_tokenizer(tmp_path, SPECIAL, before=["<a>"])
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    template = fields["post_processor"]["processors"][1]
    if part:
        template["single"] = [part]
    else:
        template["special_tokens"]["<a>"]["ids"] = [2**32 - 1]
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(str(path))
