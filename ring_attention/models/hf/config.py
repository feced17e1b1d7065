"""A Hugging Face config.json as a `ModelConfig` and what attention has, and back, by the table of `families`.

Whatever the model cannot do is refused by name: a key that no family's row reads must have the one value that
`keys.FIXED` allows, or stand in `keys.IGNORED`. What is written is read again, so that nothing is left unsaid.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ring_attention.checks import ConfigError, require_field
from ring_attention.models.config import ModelConfig
from ring_attention.models.hf.facts import UnsayableError, facts_of, kinds_by_layer, require_same
from ring_attention.models.hf.families import FAMILIES, WRAPPERS
from ring_attention.models.hf.known import SIZES, family_of, require_known, text_of
from ring_attention.models.hf.layer_ropes import ropes_from_hf, ropes_to_hf
from ring_attention.models.hf.layer_types import (
    kinds_of,
    positions_from_hf,
    positions_to_hf,
    reduced,
    windows_from_hf,
    windows_to_hf,
)
from ring_attention.models.hf.values import whole
from ring_attention.models.layer_kinds import LayerKind

MOST_LAYERS = 10_000
"""The most layers of a model: a hundred times those of the deepest in use. Each has a dozen listed tensors."""

ALL_BEFORE = LayerKind(window=0, chunk=0, sinks=False, softcap=0.0)
"""Attention to all tokens before, and nothing beside."""

_LENGTH, _TEXT = "max_position_embeddings", "text_config"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFConfig:
    """What a config.json says of the function that a model computes.

    Attributes:
      family: a key of FAMILIES.
      model: the shape, with the rotary scaling and the kinds of layers.
      attention: what its layers have where `model.layers` leaves it open, but for the rotary embedding.
      max_len: positions that the model is meant for (max_position_embeddings).
      wrapper: the key of WRAPPERS of the multimodal model whose text part it is; "" for a model of text.
    """

    family: str
    model: ModelConfig
    attention: LayerKind = ALL_BEFORE
    max_len: int
    wrapper: str = ""

    @property
    def attention_fields(self) -> dict[str, Any]:
        """The fields of the section `attention` that follow from the checkpoint."""
        return {name: getattr(self.attention, name) for name in ("window", "chunk", "sinks", "softcap")}

    @property
    def transformer(self) -> ModelConfig:
        """The model with what `attention` says of its layers, of which the parameters are."""
        of_all = dataclasses.replace(self.attention, rope=self.model.rope)
        return dataclasses.replace(self.model, layers=tuple(kind.completed(of_all) for kind in self.model.kinds))

    @property
    def facts(self) -> dict[str, Any]:
        """What is computed, by field."""
        return facts_of(self.transformer, self.max_len)


def config_from_hf(values: Mapping[str, Any]) -> HFConfig:
    """Translate the contents of a config.json.

    Raises:
      ConfigError: naming the first key, its value and what to do, for all that is not implemented.
    """
    name = values.get("model_type")
    if isinstance(name, str) and name in WRAPPERS:
        return dataclasses.replace(_of_text(text_of(values, WRAPPERS[name])), wrapper=name)
    return _of_text(values)


def _of_text(values: Mapping[str, Any]) -> HFConfig:
    name = family_of(values)
    family = FAMILIES[name]
    require_known(values, family)
    values = {**family.defaults, **values}
    heads, width = whole(values, "num_attention_heads"), whole(values, "hidden_size")
    head_dim = whole(values, "head_dim", None)
    if head_dim is None:
        fits = width % heads == 0
        require_field(fits, "hidden_size", width, f"is not divisible by num_attention_heads={heads}", "give head_dim")
        head_dim = width // heads
    layers, max_len = whole(values, "num_hidden_layers", most=MOST_LAYERS), whole(values, _LENGTH)
    fields = dict(family.model)
    for key in family.keys:
        fields |= dict.fromkeys(key.fields, key.read(values, key.name))
    softcap = fields.pop("attention.softcap", 0.0)
    windows = windows_from_hf(values, family.layers, layers)
    ropes = ropes_from_hf(values, family.layers, max_len, family.rope)
    positions = positions_from_hf(values, family.layers, windows)
    of_all, period = reduced(kinds_of(windows, positions, ropes))
    model = ModelConfig(
        vocab_size=whole(values, "vocab_size"),
        num_layers=layers,
        model_dim=width,
        num_heads=heads,
        num_kv_heads=whole(values, "num_key_value_heads", heads),
        head_dim=head_dim,
        ffn_dim=whole(values, "intermediate_size"),
        rope=of_all.rope,
        layers=period,
        **fields,
    )
    attention = dataclasses.replace(ALL_BEFORE, window=of_all.window, softcap=softcap)
    return HFConfig(family=name, model=model, attention=attention, max_len=max_len)


def config_to_hf(config: HFConfig) -> dict[str, Any]:
    """The keys of config.json that say what `config` does, as versions 4 and 5 of transformers read them.

    `config_from_hf` gives `config` back, but for what does not change the function (chunks, dtypes, remat).

    Raises:
      ConfigError: naming the field, for what the family cannot express.
    """
    model = config.model
    written = {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "pad_token_id": None,  # the defaults of some classes lie beyond a small vocabulary
        **{key: getattr(model, field) for key, field in SIZES.items()},
        _LENGTH: config.max_len,
        **_keys_to_hf(config),
        **_ropes_to_hf(config),
        **_windows_to_hf(config),
    }
    require_same(config.family, config.facts, config_from_hf(written).facts)
    return written


def update_hf(values: Mapping[str, Any], config: HFConfig) -> dict[str, Any]:
    """The config.json `values` changed to say what `config` does; keys that say so already are left as they are.

    Raises:
      ConfigError: naming the field, for what the family cannot express.
    """
    family, was, now = FAMILIES[config.family], config_from_hf(values).facts, config.facts
    changed = dict(values[_TEXT] if config.wrapper else values)
    read = (lambda: config_from_hf({**values, _TEXT: changed})) if config.wrapper else (lambda: config_from_hf(changed))
    if was["seq_len"] != now["seq_len"]:
        changed[_LENGTH] = config.max_len
    written = _keys_to_hf(config)
    for key in family.keys:
        if key.name in written and any(was[_named(field)] != now[_named(field)] for field in key.fields):
            changed[key.name] = written[key.name]
    if was["attention.window"] != now["attention.window"]:
        for key in ("layer_types", family.layers.period_key):
            changed.pop(key, None)
        changed |= _windows_to_hf(config)
    if read().facts["model.rope"] != now["model.rope"]:  # some scalings begin at max_position_embeddings
        nested = changed.get("rope_parameters") is not None
        for key in (*family.rope.keys, family.layers.local_theta, family.layers.positions):
            changed.pop(key, None)
        changed |= _ropes_to_hf(config, nested=nested)
    require_same(config.family, now, read().facts)
    return {**values, _TEXT: changed} if config.wrapper else changed


def family_for(model: ModelConfig, attention: LayerKind, max_len: int) -> str:
    """The first family that a model trained here can be written as.

    Raises:
      ConfigError: naming a field that the nearest family cannot express, where there is none.
    """
    refused: list[tuple[int, ConfigError]] = []
    for name in FAMILIES:
        try:
            config_to_hf(HFConfig(family=name, model=model, attention=attention, max_len=max_len))
            return name
        except UnsayableError as error:
            refused.append((error.count, error))
        except ConfigError as error:  # whatever the family
            refused.append((len(FAMILIES), error))
    raise min(refused, key=lambda each: each[0])[1]


def _named(field: str) -> str:
    """The name among facts of a field of a `Key`."""
    return field if "." in field else f"model.{field}"


def _keys_to_hf(config: HFConfig) -> dict[str, Any]:
    """The keys of the family's row."""
    keys = {}
    for key in FAMILIES[config.family].keys:
        section, _, name = key.fields[0].rpartition(".")
        value = getattr(config.attention if section else config.model, name)
        if key.write and value != key.unsaid:
            keys[key.name] = key.write(value, config.model)
    return keys


def _windows_to_hf(config: HFConfig) -> dict[str, Any]:
    windows = [kind.reach or 0 for kind in kinds_by_layer(config.transformer)]
    return windows_to_hf(windows, FAMILIES[config.family].layers)


def _ropes_to_hf(config: HFConfig, *, nested: bool = False) -> dict[str, Any]:
    family = FAMILIES[config.family]
    turned = [kind for kind in kinds_by_layer(config.transformer) if kind.rope and kind.rope.fraction]
    ropes = [next((kind.rope for kind in turned if bool(kind.window) is local), None) for local in (False, True)]
    full, sliding = (rope or ropes[0] or ropes[1] or config.model.rope for rope in ropes)
    ropes = ropes_to_hf(full, sliding, family.layers, config.max_len, family.rope, nested=nested)
    return ropes | positions_to_hf(kinds_by_layer(config.transformer), family.layers)
