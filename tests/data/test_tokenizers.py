import inspect
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ring_attention.checks import ConfigError
from ring_attention.data.tokenizers import load_tokenizer

TEXT = inspect.getsource(json.decoder) + "naïve 世界 🙂 "


def byte_level_bpe(path, special_tokens=(), added_tokens=()):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens(list(added_tokens))
    tokenizer.save(str(path))
    return load_tokenizer(str(path))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return byte_level_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@given(st.binary())
def test_byte_tokenizer_gives_bytes_back(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text)
    assert tokenizer.token_bytes(ids) == text


def test_byte_tokenizer_opens_documents_with_id_256():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.document_start) == (257, 256)
    assert tokenizer.token_bytes([256, 65, 256]) == b"A"


@given(st.text())
def test_byte_level_bpe_gives_the_exact_bytes_back(bpe, text):
    text = text.encode()
    ids = bpe.encode(text)
    assert ids.dtype == np.int32
    assert bpe.token_bytes(ids) == text


def test_token_bytes_do_not_depend_on_neighbours(bpe):
    ids = bpe.encode(TEXT.encode())
    pieces = [bpe.token_bytes([i]) for i in ids]
    assert b"".join(pieces) == TEXT.encode()
    assert max(map(len, pieces)) > 1  # merges were learned
    assert bytes([0x96]) in pieces  # the middle of a character, which decoding token by token to text would lose


def test_document_start_is_a_new_id_without_special_tokens(bpe):
    assert (bpe.vocab_size, bpe.document_start) == (321, 320)
    assert bpe.token_bytes([320]) == b""


@pytest.mark.parametrize("name", ["<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[BOS]"])
def test_document_start_is_the_files_own(tmp_path, name):
    tokenizer = byte_level_bpe(tmp_path / "t.json", special_tokens=["<pad>", name])
    assert (tokenizer.vocab_size, tokenizer.document_start) == (320, 1)
    assert tokenizer.token_bytes([1, 1]) == b""


def test_encode_takes_special_tokens_for_text_if_asked(tmp_path):
    tokenizer = byte_level_bpe(tmp_path / "t.json", special_tokens=["<s>"])
    ids = tokenizer.encode(b"a <s> b", special_tokens=False)
    assert tokenizer.document_start not in ids
    assert tokenizer.token_bytes(ids) == b"a <s> b"


def test_document_start_is_no_ordinary_token_like_one(tmp_path):
    tokenizer = byte_level_bpe(tmp_path / "t.json", added_tokens=["<s>"])
    assert tokenizer.document_start == tokenizer.vocab_size - 1 == 321
    assert tokenizer.token_bytes(tokenizer.encode(b"a <s> b")) == b"a <s> b"


def test_token_bytes_of_tokens_added_in_plain_text(tmp_path):
    tokenizer = byte_level_bpe(tmp_path / "t.json", added_tokens=["two words 世"])
    text = "a two words 世 b".encode()
    assert 320 in tokenizer.encode(text)
    assert tokenizer.token_bytes(tokenizer.encode(text)) == text


def test_token_bytes_of_other_vocabularies_are_utf8(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "wörld": 1, "hello": 5}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.vocab_size == 7  # ids up to 5, holes included, and one more for document_start
    assert tokenizer.token_bytes([6, *tokenizer.encode("hello wörld".encode())]) == "hello wörld".encode()


@pytest.mark.parametrize("spec", ["bytes", "bpe"])
def test_token_bytes_refuse_ids_outside_the_vocabulary(bpe, spec):
    tokenizer = bpe if spec == "bpe" else load_tokenizer("bytes")
    for unknown in (-1, tokenizer.vocab_size):
        with pytest.raises(
            ValueError, match=rf"token ids \[{unknown}\] are outside \[0, {tokenizer.vocab_size}\); use"
        ):
            tokenizer.token_bytes([65, unknown])


def test_load_tokenizer_refuses_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"^data.tokenizer='byte': is neither 'bytes' nor a file; give the path of a"):
        load_tokenizer("byte")


def test_load_tokenizer_refuses_a_file_that_is_none(tmp_path):
    (tmp_path / "t.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match=r"^data.tokenizer='.*t.json': is no Hugging Face tokenizer \(.*\); give the"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_load_tokenizer_switches_truncation_and_padding_off(tmp_path):
    byte_level_bpe(tmp_path / "t.json")
    fields = json.loads((tmp_path / "t.json").read_text())
    cut = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    cut.enable_truncation(8)
    cut.enable_padding(length=40)
    cut.save(str(tmp_path / "cut.json"))
    assert json.loads((tmp_path / "cut.json").read_text())["truncation"] != fields["truncation"]
    assert len(cut.encode(TEXT).ids) == 40
    whole, tokenizer = load_tokenizer(str(tmp_path / "t.json")), load_tokenizer(str(tmp_path / "cut.json"))
    for text in (TEXT.encode(), b"short"):
        assert tokenizer.encode(text).tolist() == whole.encode(text).tolist()
        assert tokenizer.token_bytes(tokenizer.encode(text)) == text


def test_encode_refuses_a_text_without_tokens_for_it(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"known": 0}, "[UNK]")).save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.encode(b"known").tolist() == [0]
    message = (
        r"^data.tokenizer='.*t.json': cannot encode a document that begins b'other\\n' \(.*\[UNK\].*\); give the tok"
    )
    with pytest.raises(ConfigError, match=message):
        tokenizer.encode(b"other\n")


def test_load_tokenizer_refuses_ids_too_large_for_a_table(tmp_path):
    byte_level_bpe(tmp_path / "t.json")
    fields = json.loads((tmp_path / "t.json").read_text())
    fields["model"]["vocab"]["!"] = 2**32 - 1
    (tmp_path / "t.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"has ids up to 4,294,967,295, need less than 16,777,216; number its tokens"):
        load_tokenizer(str(tmp_path / "t.json"))
