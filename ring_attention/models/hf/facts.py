"""What a model computes, as facts by field, to compare a model with what a config.json says."""

import dataclasses
import math
from typing import Any

from ring_attention.checks import ConfigError
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind

FREE_MODEL_FIELDS = ("compute_dtype", "remat", "head_groups", "ffn_chunk", "loss_chunk", "start_local")
"""Fields of a model that say how the same function is computed, or how parameters are drawn."""


class UnsayableError(ConfigError):
    """A family of Hugging Face cannot express a model; `count` fields of it."""

    def __init__(self, message: str, count: int):
        super().__init__(message)
        self.count = count


def kinds_by_layer(model: ModelConfig) -> list[LayerKind]:
    """The kind of each layer."""
    return [model.kinds[number % len(model.kinds)] for number in range(model.num_layers)]


def facts_of(transformer: ModelConfig, max_len: int) -> dict[str, Any]:
    """What a completed model computes, by the fields that say it; those of its kinds, layer by layer."""
    own = ("layers", "rope", "attention_scale", "value_head_dim", *FREE_MODEL_FIELDS)
    fields = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in own]
    facts = {f"model.{name}": getattr(transformer, name) for name in fields}
    facts |= {"model.attention_scale": transformer.score_scale, "model.value_head_dim": transformer.value_dim}
    kinds = kinds_by_layer(transformer)
    for name in ("window", "chunk", "sinks", "softcap"):
        facts[f"attention.{name}"] = [getattr(kind, name) for kind in kinds]
    facts["model.rope"] = [kind.rope if kind.rope and kind.rope.fraction else None for kind in kinds]
    return facts | {"seq_len": max_len}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The fields of facts that differ by more than the rounding of a float."""

    def alike(a: Any, b: Any) -> bool:
        return a == b or isinstance(a, float) and isinstance(b, float | int) and math.isclose(a, b, rel_tol=1e-12)

    return [field for field, value in ours.items() if not alike(value, theirs[field])]


def require_same(family: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise UnsayableError, naming the first field, unless a config.json of this family says what a model computes."""
    wrong = differences(ours, theirs)
    if not wrong:
        return
    field, got, need = wrong[0], ours[wrong[0]], theirs[wrong[0]]
    if isinstance(got, list):
        layer = next(i for i, (a, b) in enumerate(zip(got, need, strict=True)) if a != b)
        alike = len(set(got)) == 1
        field = field if alike else f"model.layers: {field.partition('.')[2]} of layer {layer}"
        got, need = got[layer], need[layer]
    raise UnsayableError(
        f"{field}={got!r}: a model of the family {family!r} can only say {need!r} with the rest of this config; train "
        "with that, or take the folder as train.py wrote it",
        len(wrong),
    )
