"""Which keys of a config.json are known, and what must be refused before any is translated."""

from collections.abc import Mapping
from typing import Any

from ring_attention.checks import printable, require_field
from ring_attention.models.hf.families import FAMILIES, WRAPPERS
from ring_attention.models.hf.family import Family, Wrapper
from ring_attention.models.hf.keys import FIXED, IGNORED

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
}
"""Keys that each family has -> fields of `ModelConfig`."""

_TAKE_TEXT = "take the checkpoint of the language model"
_TIED = "tie_word_embeddings"


def family_of(values: Mapping[str, Any]) -> str:
    """The row that the model type means; it must be that of the architecture.

    As `transformers` has it, a Mistral model with the key `layer_types` is a Ministral one.
    """
    known = f"known are {', '.join((*FAMILIES, *WRAPPERS))}"
    model_type = values.get("model_type")
    require_field(
        isinstance(model_type, str) and model_type in FAMILIES,
        "model_type",
        model_type,
        f"is not implemented; {known}" if model_type else f"is missing, so this is no model of Hugging Face; {known}",
        "take a checkpoint of one of these",
    )
    _require_architecture(values, FAMILIES[model_type].architecture)
    return "ministral" if model_type == "mistral" and "layer_types" in values else model_type


def _require_architecture(values: Mapping[str, Any], need: str) -> None:
    architectures = values.get("architectures")
    only = f"of model_type={values.get('model_type')!r} only {need} is implemented"
    require_field(architectures in (None, [need]), "architectures", architectures, only, _TAKE_TEXT)


def text_of(values: Mapping[str, Any], wrapper: Wrapper) -> dict[str, Any]:
    """The config.json of the text part of a multimodal one."""
    _require_architecture(values, wrapper.architecture)
    section = values.get("text_config")
    require_field(isinstance(section, dict), "text_config", section, "must be an object", "correct config.json")
    text = {"model_type": wrapper.texts[0], **section}
    model_type = text["model_type"]
    need = f"is not implemented within {values['model_type']!r}; known are {', '.join(wrapper.texts)}"
    require_field(model_type in wrapper.texts, "text_config.model_type", model_type, need, _TAKE_TEXT)
    text.pop("architectures", None)
    for key, fixed in wrapper.fixed.items():
        _require_fixed(key, text.get(key), fixed)
    for key, value in values.items():
        known = key in ("text_config", _TIED, *wrapper.keys) or key in IGNORED
        if not known and key in FIXED:
            _require_fixed(key, value, FIXED[key])
        elif not known:
            _require_known_key(key, value, False)
    if values.get(_TIED) is not None:  # it is the one that transformers goes by
        text[_TIED] = values[_TIED]
    return text


def require_known(values: Mapping[str, Any], family: Family) -> None:
    """Raise ConfigError for the first key that asks for what is not implemented, or is not known at all."""
    _require_no_code(values, family)
    read = {
        *SIZES,
        "max_position_embeddings",
        *family.rope.keys,
        *family.layers.keys,
        *(key.name for key in family.keys),
    }
    for key, value in values.items():
        if key == "auto_map" or key in read or key in family.unread:
            continue
        if key in family.fixed or key in FIXED:
            _require_fixed(key, value, family.fixed.get(key) or FIXED[key])
        else:
            _require_known_key(key, value, key in IGNORED)


def _require_fixed(key: str, value: Any, fixed: Any) -> None:
    require_field(value in fixed.allowed, printable(key), value, fixed.need, fixed.remedy)


def _require_known_key(key: str, value: Any, known: bool) -> None:
    need = "is not known and may change what the model computes"
    require_field(known, printable(key), value, need, "take it out of config.json if it does not")


def _require_no_code(values: Mapping[str, Any], family: Family) -> None:
    """Raise ConfigError where a checkpoint comes with code for another model than its family's.

    Code for classes of the family's own names, as with Yarn-Llama, is what `transformers` leaves out too unless it is
    told to trust it: the class that it has computes the same from the other keys. A tokenizer's changes no logits.
    """
    code, stem = values.get("auto_map"), family.architecture.removesuffix("ForCausalLM")
    ours = [f"{stem}{end}" for end in ("Config", "Model", "ForCausalLM", "ForSequenceClassification")]
    own = code is None or (
        isinstance(code, dict)
        and all(
            kind == "AutoTokenizer" or isinstance(place, str) and place.rpartition(".")[2] in ours
            for kind, place in code.items()
        )
    )
    need, remedy = "code that comes with a checkpoint is not run", "take a checkpoint that needs none"
    require_field(own, "auto_map", code, need, remedy)
