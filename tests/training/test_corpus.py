"""What a run says about the tokens of its documents."""

import json

import pytest
from small_tokenizers import write_tokenizer

from ring_attention.data.config import DataConfig
from ring_attention.training.batches import Corpus

CHAT = "<|im_start|>user\nhi<|im_end|>\n"
LINE = "Documents open with <s> (256), and end with </s> (257)."
SPELLED = (
    "Documents spell out special tokens, such as <|im_end|>, <|im_start|>: they are read as text. "
    "--config.data.special_tokens=true reads them as tokens."
)


@pytest.mark.parametrize(
    ("text", "changes", "lines"),
    [
        ("plain", {}, [LINE]),
        (CHAT, {}, [LINE, SPELLED]),
        (CHAT, dict(special_tokens=True), [LINE]),
        (CHAT, dict(tokenizer="bytes"), []),
    ],
)
def test_a_run_says_which_tokens_stand_around_documents_and_which_are_read_as_text(tmp_path, text, changes, lines):
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    write_tokenizer(tmp_path, special, before=["<s>"], tokenizer_config=dict(eos_token="</s>"))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(20)))
    settings = dict(paths=f"{tmp_path}/texts.jsonl", holdout_fraction=0.5, tokenizer=f"{tmp_path}/tokenizer.json")
    config = DataConfig(**settings | changes)
    assert Corpus.open(config).describe_tokens(config) == lines
