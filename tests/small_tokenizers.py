"""Small Hugging Face tokenizers with special tokens, as checkpoints have them."""

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from ring_attention.data.tokenizers import byte_level_letters, load_tokenizer


def write_tokenizer(folder, special=(), before=(), after=(), added=(), **files):
    """Write tokenizer.json: bytes are 0 to 255, then the special tokens; `files` are the JSON files beside it."""
    made = tokenizers.Tokenizer(models.BPE(vocab=byte_level_letters(), merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    made.add_tokens(list(added))
    if before or after:
        template = " ".join([*before, "$A", *after])
        names = [(name, made.token_to_id(name)) for name in {*before, *after}]
        template = processors.TemplateProcessing(single=template, special_tokens=names)
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    made.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return made, load_tokenizer(str(folder / "tokenizer.json"))
