"""A Hugging Face config.json as a `ModelConfig`, and back.

Whatever the model cannot do is refused by name: a key that is not read here or in `rope` must have the one value that
`keys.FIXED` allows, or stand in `keys.IGNORED`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ring_attention.checks import printable, require_field
from ring_attention.models.config import ModelConfig
from ring_attention.models.hf.keys import FIXED, IGNORED
from ring_attention.models.hf.rope import ROPE_KEYS, rope_from_hf, rope_to_hf
from ring_attention.models.hf.values import flag, number, whole

_SHAPE = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
_OTHERS = "rms_norm_eps max_position_embeddings tie_word_embeddings"
_WINDOW = "sliding_window use_sliding_window max_window_layers layer_types"
_READ = frozenset(f"{_SHAPE} {_OTHERS} {_WINDOW}".split())
MOST_LAYERS = 10_000
"""The most layers of a model: a hundred times those of the deepest in use. Each has a dozen listed tensors."""

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What `transformers` takes for granted of a model type.

    Attributes:
      architecture: the class with the head of a language model.
      qkv_bias: whether q, k and v have biases.
      qk_norm: whether q and k are normalised.
      window_key: the key that switches the sliding window on; "" where the family has none.
      defaults: values of absent keys.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    window_key: str = ""
    defaults: Mapping[str, Any]


_QWEN = dict(num_key_value_heads=32, max_position_embeddings=32_768, sliding_window=4096, max_window_layers=28)
FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", defaults=dict(max_position_embeddings=2048)),
    "mistral": Family(
        architecture="MistralForCausalLM",
        window_key="sliding_window",
        defaults=dict(num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096),
    ),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True, window_key="use_sliding_window", defaults=_QWEN),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        qk_norm=True,
        window_key="use_sliding_window",
        defaults=_QWEN | dict(head_dim=128),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFConfig:
    """What a config.json says of the function that a model computes.

    Attributes:
      family: a key of FAMILIES.
      model: the shape, with the rotary scaling.
      window: a token sees itself and the window-1 tokens before it; 0: all before it.
      max_len: positions that the model is meant for (max_position_embeddings).
    """

    family: str
    model: ModelConfig
    window: int
    max_len: int


def config_from_hf(values: Mapping[str, Any]) -> HFConfig:
    """Translate the contents of a config.json.

    Raises:
      ConfigError: naming the first key, its value and what to do, for all that is not implemented.
    """
    family = _family(values)
    given = FAMILIES[family]
    _require_known(values, given)
    for key, default in given.defaults.items():
        if key not in values:
            values = {**values, key: default}
    heads, width = whole(values, "num_attention_heads"), whole(values, "hidden_size")
    head_dim = whole(values, "head_dim", None)
    if head_dim is None:
        fits = width % heads == 0
        require_field(fits, "hidden_size", width, f"is not divisible by num_attention_heads={heads}", "give head_dim")
        head_dim = width // heads
    layers, max_len = whole(values, "num_hidden_layers", most=MOST_LAYERS), whole(values, "max_position_embeddings")
    model = ModelConfig(
        vocab_size=whole(values, "vocab_size"),
        num_layers=layers,
        model_dim=width,
        num_heads=heads,
        num_kv_heads=whole(values, "num_key_value_heads", heads),
        head_dim=head_dim,
        ffn_dim=whole(values, "intermediate_size"),
        norm_epsilon=number(values, "rms_norm_eps", 1e-6),
        rope=rope_from_hf(values, max_len),
        tied_embeddings=flag(values, "tie_word_embeddings"),
        qkv_bias=given.qkv_bias,
        qk_norm=given.qk_norm,
    )
    return HFConfig(family=family, model=model, window=_window(values, given, layers), max_len=max_len)


def config_to_hf(config: HFConfig) -> dict[str, Any]:
    """The keys of config.json that say what `config` does, as versions 4 and 5 of transformers read them.

    `config_from_hf` gives `config` back, but for what does not change the function (chunks, dtypes, remat).

    Raises:
      ConfigError: for what the family cannot express.
    """
    model, family = config.model, FAMILIES[config.family]
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.model_dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        **rope_to_hf(model.rope, config.max_len),
        **_window_to_hf(config),
    }


def update_hf(values: Mapping[str, Any], config: HFConfig) -> dict[str, Any]:
    """The config.json `values` changed to say what `config` does; returned as it is where it says so already.

    Only rotary scaling, window and length can change: the rest is the shape of the weights.
    """
    before = config_from_hf(values)
    changed = dict(values)
    if before.max_len != config.max_len:
        changed["max_position_embeddings"] = config.max_len
    if before.window != config.window:
        changed.pop("layer_types", None)
        changed |= _window_to_hf(config)
    if rope_from_hf(changed, config.max_len) != config.model.rope:  # some scalings begin at max_position_embeddings
        nested = values.get("rope_parameters") is not None
        for key in ROPE_KEYS:
            changed.pop(key, None)
        changed |= rope_to_hf(config.model.rope, config.max_len, nested=nested)
    return changed


def family_for(model: ModelConfig, window: int) -> str:
    """The family that a model of this shape can be written as; ConfigError where there is none."""
    require_field(
        not (model.qkv_bias and model.qk_norm),
        "model.qkv_bias",
        True,
        "no family has biases on q, k and v as well as norms of q and k",
        "train with one of model.qkv_bias and model.qk_norm",
    )
    if model.qkv_bias:
        return "qwen2"
    if model.qk_norm:
        return "qwen3"
    return "mistral" if window else "llama"


def _family(values: Mapping[str, Any]) -> str:
    """The model type, which must be that of the architecture."""
    known = f"known are {', '.join(FAMILIES)}"
    model_type = values.get("model_type")
    require_field(
        isinstance(model_type, str) and model_type in FAMILIES,
        "model_type",
        model_type,
        f"is not implemented; {known}" if model_type else f"is missing, so this is no model of Hugging Face; {known}",
        "take a checkpoint of one of these",
    )
    architectures = values.get("architectures")
    need = FAMILIES[model_type].architecture
    require_field(
        architectures in (None, [need]),
        "architectures",
        architectures,
        f"of model_type={model_type!r} only {need} is implemented",
        "take the checkpoint of the language model",
    )
    return model_type


def _require_no_code(values: Mapping[str, Any], family: Family) -> None:
    """Raise ConfigError where a checkpoint comes with code for another model than its family's.

    Code for classes of the family's own names, as with Yarn-Llama, is what `transformers` leaves out too unless it is
    told to trust it: the class that it has computes the same from the other keys.
    """
    code, stem = values.get("auto_map"), family.architecture.removesuffix("ForCausalLM")
    ours = [f"{stem}{end}" for end in ("Config", "Model", "ForCausalLM", "ForSequenceClassification")]
    own = code is None or (
        isinstance(code, dict)
        and all(isinstance(place, str) and place.rpartition(".")[2] in ours for place in code.values())
    )
    need, remedy = "code that comes with a checkpoint is not run", "take a checkpoint that needs none"
    require_field(own, "auto_map", code, need, remedy)


def _require_known(values: Mapping[str, Any], family: Family) -> None:
    """Raise ConfigError for the first key that asks for what is not implemented, or is not known at all."""
    _require_no_code(values, family)
    for key, value in values.items():
        if key == "auto_map":
            continue
        if key in FIXED:
            fixed = FIXED[key]
            require_field(value in fixed.allowed, printable(key), value, fixed.need, fixed.remedy)
        else:
            require_field(
                key in _READ or key in ROPE_KEYS or key in IGNORED,
                printable(key),
                value,
                "is not known and may change what the model computes",
                "take it out of config.json if it does not",
            )


def _window(values: Mapping[str, Any], family: Family, layers: int) -> int:
    """The sliding window of all layers, 0 for none."""
    size = whole(values, "sliding_window", 0)
    if family.window_key != "sliding_window" and not flag(values, "use_sliding_window"):
        size = 0
    if not family.window_key:
        given = values.get("sliding_window") or flag(values, "use_sliding_window")
        require_field(not given, "sliding_window", values.get("sliding_window"), "llama has none", "set it to null")
    kinds = values.get("layer_types")
    if kinds is None:
        first = _first_window_layer(values, family)
        kinds = [_SLIDING if size and layer >= first else _FULL for layer in range(layers)]
    right = isinstance(kinds, list) and len(kinds) == layers
    require_field(right, "layer_types", kinds, f"must name the kind of each of {layers} layers", "correct config.json")
    sliding = kinds.count(_SLIDING)
    require_field(
        kinds.count(_FULL) + sliding == layers,
        "layer_types",
        next((kind for kind in kinds if kind not in (_FULL, _SLIDING)), None),
        f"only {_FULL} and {_SLIDING} are implemented",
        "take a checkpoint without others",
    )
    require_field(
        sliding in (0, layers),
        "layer_types" if values.get("layer_types") else "max_window_layers",
        values.get("layer_types") or values.get("max_window_layers"),
        f"{sliding} of {layers} layers have a sliding window; all or none is implemented",
        "take a checkpoint whose layers are alike",
    )
    require_field(
        not sliding or size > 0, "layer_types", kinds, "sliding layers without sliding_window", "give its size"
    )
    return size if sliding else 0


def _first_window_layer(values: Mapping[str, Any], family: Family) -> int:
    if family.window_key != "use_sliding_window":
        return 0
    first = values.get("max_window_layers")
    if first in (0, None):
        return 0
    return whole(values, "max_window_layers")


def _window_to_hf(config: HFConfig) -> dict[str, Any]:
    """The keys for the window of `config`."""
    window = config.window
    match FAMILIES[config.family].window_key:
        case "sliding_window":
            return {"sliding_window": window or None}
        case "use_sliding_window":
            on = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
            return on if window else {"use_sliding_window": False}
    require_field(
        not window,
        "attention.window",
        window,
        f"a model of the family {config.family!r} has no sliding window",
        "use 0, or begin with a Mistral checkpoint, which has the same layers",
    )
    return {}
