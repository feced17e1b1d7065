"""Text comes as soon as it is certain, whole and once, whatever the tokenizer."""

import numpy as np
import pytest
import tokenizers

from ring_attention.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from ring_attention.inference.text import TextStream

TEXT = "Grüße, 世界! 👋🏽 the end of it.\n\tAnd more"


def _byte_level(path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path))
    return HuggingFaceTokenizer(str(path))


def _sentence_piece(path):
    """As Llama 2's: words begin with a mark, unknown characters fall back on bytes, tokens are decoded together."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set(" ".join(TEXT) + "▁")), "▁the", "▁end"]
    vocab = [(piece, -float(i > 256) * 2.0) for i, piece in enumerate(dict.fromkeys(pieces)) if piece not in "世👋"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0, byte_fallback=True))
    parts = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = tokenizers.normalizers.Sequence(parts)
    decoders = tokenizers.decoders
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.save(str(path))
    return HuggingFaceTokenizer(str(path))


@pytest.fixture(params=["bytes", "byte level", "sentence piece"])
def tokenizer(request, tmp_path):
    makers = {"byte level": _byte_level, "sentence piece": _sentence_piece}
    return makers[request.param](tmp_path / "tokenizer.json") if request.param in makers else ByteTokenizer()


def _pieces(tokenizer, prompt=(), text=TEXT, **settings):
    ids = tokenizer.encode(text.encode())
    stream = TextStream(tokenizer, prompt, **settings)
    return [*(stream.feed(token) for token in ids), stream.finish()]


def test_text_stream_gives_no_character_in_parts(tokenizer):
    pieces = _pieces(tokenizer)
    assert "".join(pieces) == TEXT
    assert "�" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 10, "as it comes, not at the end"
    naive = "".join(tokenizer.token_bytes([i]).decode(errors="replace") for i in tokenizer.encode(TEXT.encode()))
    assert naive != TEXT, "the control"


def test_text_stream_keeps_the_space_after_the_prompt(tokenizer):
    ids = tokenizer.encode(b"the end of it")
    whole = tokenizer.token_bytes(ids).decode()
    for cut in range(1, len(ids)):
        prompt = tokenizer.token_bytes(ids[:cut]).decode(errors="replace")
        stream = TextStream(tokenizer, ids[:cut])
        rest = "".join(stream.feed(token) for token in ids[cut:]) + stream.finish()
        assert prompt + rest == whole


def test_text_stream_ends_before_a_stop(tokenizer):
    pieces = _pieces(tokenizer, stop=["end of", "it.", "never"])
    assert "".join(pieces) == TEXT[: TEXT.index("end of")]
    assert "".join(_pieces(tokenizer, stop=["of the"])) == TEXT, "what only began like a stop comes after all"
    stream = TextStream(ByteTokenizer(), (), stop=["abc"])
    assert [stream.feed(ord(c)) for c in "xabab"] == ["x", "", "", "ab", ""]
    assert not stream.ended
    assert [stream.feed(ord(c)) for c in "cz"] == ["", ""]
    assert stream.ended
    assert stream.finish() == ""


def test_text_stream_shows_bytes_that_are_no_text():
    stream = TextStream(ByteTokenizer(), ())
    got = "".join(stream.feed(token) for token in [0xC3, 0x28, 0xFF, ord("a"), 256, 0xE4]) + stream.finish()
    assert got == "�(�a�"


@pytest.mark.parametrize("maker", [_byte_level, _sentence_piece])
@pytest.mark.parametrize("show", [False, True])
def test_text_stream_leaves_special_tokens_out_unless_asked(maker, show, tmp_path):
    """Those that open and end documents, too; what stands around one is whole, and so is a stop that follows it."""
    maker(tmp_path / "tokenizer.json")
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = HuggingFaceTokenizer(str(tmp_path / "tokenizer.json"))
    start, end, other = (made.token_to_id(name) for name in ("<s>", "</s>", "<|im_end|>"))
    ids = [start, *tokenizer.encode("Grüße, 世界!".encode()), other, *tokenizer.encode(b"And more of it"), end]

    def text(**settings):
        stream = TextStream(tokenizer, (), show_special=show, **settings)
        return "".join([*map(stream.feed, ids), stream.finish()])

    whole = text()
    space = " " if maker is _sentence_piece else ""  # of a text that begins; its decoder strips that of the first alone
    if show:
        assert whole == f"<s>Grüße, 世界!<|im_end|>{space}And more of it</s>"
        assert text(stop=["</s>"]) == whole.removesuffix("</s>")
    else:
        assert whole == f"Grüße, 世界!{space}And more of it"
    assert text(stop=["more"]) == whole[: whole.index("more")]


def test_text_stream_shows_the_end_of_bytes_where_asked():
    stream = TextStream(ByteTokenizer(), (), show_special=True)
    assert "".join([*map(stream.feed, [ord("a"), 0xE4, 256]), stream.finish()]) == "a\N{REPLACEMENT CHARACTER}<s>"


def test_text_stream_refuses_an_empty_stop():
    with pytest.raises(ValueError, match="stop holds an empty text"):
        TextStream(ByteTokenizer(), np.array([1]), stop=["x", ""])
