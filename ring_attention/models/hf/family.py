"""What a family of Hugging Face checkpoints is told by: facts that a row of `families` states."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from ring_attention.checks import require_field
from ring_attention.models.config import ModelConfig
from ring_attention.models.hf.keys import Fixed
from ring_attention.models.hf.layer_types import LayerTypes
from ring_attention.models.hf.rope import RopeFacts
from ring_attention.models.hf.values import flag, number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A key of config.json that says what fields of a model are.

    Attributes:
      name: of the key.
      fields: of `ModelConfig`, all set to the same; "attention.softcap" is that of attention.
      read: read(values, name) -> the value of the fields.
      write: write(value, model) -> the value of the key; None: the key is written by others.
      unsaid: a value of the fields that needs no key; None: it is always written.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Any]
    write: Callable[[Any, ModelConfig], Any] | None = None
    unsaid: Any = None


def scale(name: str, field: str) -> Key:
    """Return the key of a factor."""
    return Key(name=name, fields=(field,), read=lambda v, k: number(v, k, 1.0), write=lambda x, model: x)


def divisor(name: str, field: str) -> Key:
    """Return the key of what is divided by, for a field that is multiplied by."""
    return Key(
        name=name, fields=(field,), read=lambda v, k: 1 / number(v, k, 1.0), write=lambda x, model: _whole(1 / x)
    )


def root_divisor(name: str, field: str) -> Key:
    """Return the key of a number by whose root scores are divided, for the field that multiplies them."""
    write = lambda x, model: _whole(model.score_scale**-2)  # noqa: E731
    return Key(name=name, fields=(field,), read=lambda v, k: number(v, k) ** -0.5, write=write)


def score_scale(name: str) -> Key:
    """Return the key of what scores are multiplied by."""
    fields = ("attention_scale",)
    return Key(name=name, fields=fields, read=lambda v, k: number(v, k, 1.0), write=lambda x, model: model.score_scale)


def cap(name: str, field: str) -> Key:
    """Return the key of a soft cap, null for none."""
    return Key(name=name, fields=(field,), read=lambda v, k: number(v, k, 0.0), write=lambda x, model: x or None)


def switch(name: str, *fields: str) -> Key:
    """Return the key of what some models have; absent where they have not."""
    return Key(name=name, fields=fields, read=flag, write=lambda x, model: x, unsaid=False)


def activation(name: str = "hidden_act") -> Key:
    """Return the key of the feed-forward's activation."""
    ours = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

    def read(values: Mapping[str, Any], key: str) -> str:
        value = values.get(key)
        known = value is None or isinstance(value, str) and value in ours
        need = "only 'silu' (SwiGLU) and 'gelu_pytorch_tanh' are implemented"
        require_field(known, key, value, need, "take a checkpoint without it")
        return ours[value or "silu"]

    theirs = {field: value for value, field in ours.items()}
    return Key(name=name, fields=("activation",), read=read, write=lambda x, model: theirs.get(x, "silu"))


def _whole(x: float) -> float:
    """The whole number that x is but for rounding, or x."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x


EPSILON = Key(
    name="rms_norm_eps", fields=("norm_epsilon",), read=lambda v, k: number(v, k, 1e-6), write=lambda x, model: x
)
TIED = Key(name="tie_word_embeddings", fields=("tied_embeddings",), read=flag, write=lambda x, model: x)
ROOT_OF_WIDTH = Key(name="hidden_size", fields=("embedding_scale",), read=lambda v, k: math.sqrt(v[k]))
ATTENTION_BIAS = switch("attention_bias", "qkv_bias", "out_bias")
MLP_BIAS = switch("mlp_bias", "ffn_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What `transformers` takes for granted of a model type.

    Attributes:
      architecture: the class with the head of a language model.
      model: fields of `ModelConfig` that all its models have.
      keys: keys that say what others are.
      defaults: values of absent keys. A null stays one.
      layers: which layers have a window and which rotary embedding.
      rope: what its class makes of the rotary keys.
      names: parameters whose tensors are called otherwise than Llama's, and lie otherwise: (template, pattern).
        Parameters with one template lie one after the other in one tensor.
      fixed: keys with but one value in this family.
      unread: keys that its files hold and no version of transformers reads.
    """

    architecture: str
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: tuple[Key, ...] = (activation(), EPSILON, TIED)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: LayerTypes = LayerTypes()
    rope: RopeFacts = RopeFacts()
    names: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Fixed] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A multimodal model type whose text part, in `text_config`, is a model of a family.

    Attributes:
      architecture: its class.
      texts: families that its text part may be of; the first where it says nothing.
      keys: keys beside `text_config` that say nothing of the text part.
      fixed: keys of the text part with but one value within this.
      tensors: how names of tensors begin that are of other parts, with and without "model." before.
    """

    architecture: str
    texts: tuple[str, ...]
    keys: tuple[str, ...]
    fixed: Mapping[str, Fixed] = dataclasses.field(default_factory=dict)
    tensors: tuple[str, ...]
