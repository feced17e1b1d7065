"""What stands before a prompt, and the tokens of its text, are those that transformers feeds the same model."""

import json

import pytest
from small_tokenizers import write_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interop

TEXT = "<|im_start|>user\nhi, 世界<|im_end|>\n"
SPECIAL = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]

END = dict(__type="AddedToken", content="</s>", lstrip=False, normalized=False, rstrip=False, single_word=False)


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize(
    ("before", "about"),
    [
        (["<s>"], dict(bos_token="<s>", eos_token="</s>")),
        (["<s>"], dict(bos_token="<|endoftext|>", eos_token=END, add_bos_token=False)),
        ([], dict(bos_token="<s>", eos_token="<|im_end|>", add_bos_token=True)),
        ([], dict(eos_token="<|im_end|>")),
        (["<|im_start|>", "<s>"], dict(eos_token="<|endoftext|>")),
    ],
)
def test_prompts_are_what_transformers_feeds(tmp_path, kind, before, about):
    about = about | dict(tokenizer_class=kind)
    _, ours = write_tokenizer(tmp_path, SPECIAL, before=before, tokenizer_config=about)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llama", bos_token_id=257)))
    transformers.logging.set_verbosity_error()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    want = theirs(TEXT).input_ids
    assert [*ours.prompt_start, *ours.encode(TEXT.encode())] == want
    assert ours.document_end == theirs.eos_token_id
    assert [*ours.prompt_start, *ours.encode(TEXT.encode(), special_tokens=False)] != want, "the control"
