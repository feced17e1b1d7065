"""Rotary embeddings of layers that see all and of those with a window: from keys of config.json, and back."""

from collections.abc import Mapping
from typing import Any

from ring_attention.checks import require_field
from ring_attention.models.hf.layer_types import FULL, SLIDING, LayerTypes
from ring_attention.models.hf.rope import RopeFacts, rope_from_hf, rope_to_hf
from ring_attention.models.hf.values import number
from ring_attention.models.rope import RopeConfig


def ropes_from_hf(
    values: Mapping[str, Any], rule: LayerTypes, max_len: int, facts: RopeFacts
) -> tuple[RopeConfig, RopeConfig]:
    """The rotary embeddings of layers that see all, and of those with a window.

    Older keys, where the two differ, scale those that see all only, and give each a base. The newer are a section for
    each type of layer.

    Raises:
      ConfigError: as `rope_from_hf`, and for keys that versions of transformers read differently.
    """
    if not rule.rope_by_type:
        rope = rope_from_hf(values, max_len, rule.thetas[0], facts=facts)
        return rope, rope
    new, theta = values.get("rope_parameters"), values.get("rope_theta")
    own = values.get(rule.local_theta) if rule.local_theta else theta
    if not new:
        same = bool(rule.local_theta) or theta == rule.thetas[1]
        need = f"versions of transformers disagree on what it says of layers with a window, but for {rule.thetas[1]:g}"
        require_field(same, "rope_theta", theta, need, "give rope_parameters for each type of layer")
        local = number({"rope_theta": own}, "rope_theta", rule.thetas[1])
        return rope_from_hf(values, max_len, rule.thetas[0], facts=facts), RopeConfig(theta=local)
    by_type = isinstance(new, dict) and set(new) == {FULL, SLIDING} and not values.get("rope_scaling")
    need = f"must hold a section for {FULL} and one for {SLIDING}, without rope_scaling beside it"
    require_field(by_type, "rope_parameters", new, need, "correct config.json")
    full, sliding = (
        rope_from_hf({"rope_parameters": new[kind], "rope_theta": outer}, max_len, default, facts=facts)
        for kind, outer, default in zip((FULL, SLIDING), (theta, own), rule.thetas, strict=True)
    )
    return full, sliding


def ropes_to_hf(
    full: RopeConfig, sliding: RopeConfig, rule: LayerTypes, max_len: int, facts: RopeFacts, *, nested: bool = False
) -> dict[str, Any]:
    """The keys for the rotary embeddings of both types of layers; all in `rope_parameters` if `nested`."""
    if not rule.rope_by_type:
        return rope_to_hf(full, max_len, facts=facts, nested=nested)
    old = bool(rule.local_theta) or full.theta == sliding.theta == rule.thetas[1]
    if old and sliding.scaling == "none" and not nested:
        return rope_to_hf(full, max_len, facts=facts) | ({rule.local_theta: sliding.theta} if rule.local_theta else {})
    by_type = {FULL: full, SLIDING: sliding}
    sections = {
        kind: rope_to_hf(rope, max_len, facts=facts, nested=True)["rope_parameters"] for kind, rope in by_type.items()
    }
    return {"rope_parameters": sections}
