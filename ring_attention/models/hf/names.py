"""Which tensor of a Hugging Face checkpoint is which parameter, and how its axes lie.

A parameter is named by its path in the model's tree, joined by dots. A pattern says, as einops does, how the axes of
the tensor become those of the parameter (of one layer of it): letters as in `ring_attention`, `(H D)` is one axis.
"""

import dataclasses
import re
from typing import Any

import einops
import numpy as np
from flax.traverse_util import flatten_dict

from ring_attention.models.config import ModelConfig
from ring_attention.models.transformer import parameter_specs

_LAYER = "model.layers.{}."
_NAMES: dict[str, tuple[str, str]] = {
    "embed": ("model.embed_tokens.weight", "V M -> V M"),
    "norm.scale": ("model.norm.weight", "M -> M"),
    "unembed": ("lm_head.weight", "V M -> M V"),
    "layers.attention_norm.scale": (_LAYER + "input_layernorm.weight", "M -> M"),
    "layers.attention.query": (_LAYER + "self_attn.q_proj.weight", "(H D) M -> M H D"),
    "layers.attention.key": (_LAYER + "self_attn.k_proj.weight", "(K D) M -> M K D"),
    "layers.attention.value": (_LAYER + "self_attn.v_proj.weight", "(K D) M -> M K D"),
    "layers.attention.out": (_LAYER + "self_attn.o_proj.weight", "M (H D) -> H D M"),
    "layers.attention.query_bias": (_LAYER + "self_attn.q_proj.bias", "(H D) -> H D"),
    "layers.attention.key_bias": (_LAYER + "self_attn.k_proj.bias", "(K D) -> K D"),
    "layers.attention.value_bias": (_LAYER + "self_attn.v_proj.bias", "(K D) -> K D"),
    "layers.attention.query_norm.scale": (_LAYER + "self_attn.q_norm.weight", "D -> D"),
    "layers.attention.key_norm.scale": (_LAYER + "self_attn.k_norm.weight", "D -> D"),
    "layers.feedforward_norm.scale": (_LAYER + "post_attention_layernorm.weight", "M -> M"),
    "layers.feedforward.gate": (_LAYER + "mlp.gate_proj.weight", "F M -> M F"),
    "layers.feedforward.up": (_LAYER + "mlp.up_proj.weight", "F M -> M F"),
    "layers.feedforward.down": (_LAYER + "mlp.down_proj.weight", "M F -> F M"),
}

TIED_COPY = "lm_head.weight"
"""A tensor that some files hold beside a tied embedding; it must equal it."""

_NO_PARAMETER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def is_no_parameter(name: str) -> bool:
    """Whether a tensor of older checkpoints follows from their config: rotary frequencies."""
    return _NO_PARAMETER.fullmatch(name) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a checkpoint, and where it goes.

    Attributes:
      name: in the checkpoint.
      parameter: dotted path in the model's tree.
      layer: index along the parameter's first axis, of the stack; None where it has none of layers.
      pattern: how the axes of the tensor become those of the parameter, or of its layer.
      sizes: of each letter.
    """

    name: str
    parameter: str
    layer: int | None
    pattern: str
    sizes: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the checkpoint."""
        return tuple(np.prod([self.sizes[x] for x in axis], dtype=int).item() for axis in _axes(self._sides()[0]))

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameter, or of one layer of it."""
        return tuple(self.sizes[x] for x in self._sides()[1].split())

    def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor, or a slice of it that `slices` gave, with the parameter's axes; a view where that can be."""
        return einops.rearrange(tensor, self.pattern, **self._inner())

    def to_tensor(self, parameter: np.ndarray) -> np.ndarray:
        """Undo `to_parameter`."""
        left, right = self._sides()
        return einops.rearrange(parameter, f"{right} -> {left}", **self._inner())

    def slices(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slice of the tensor that becomes `index` of the parameter, which takes whole heads."""
        left, right = self._sides()
        bounds = {
            letter: part.indices(self.sizes[letter])[:2] for letter, part in zip(right.split(), index, strict=True)
        }
        slices = []
        for first, *rest in _axes(left):
            step = np.prod([self.sizes[letter] for letter in rest], dtype=int).item()
            slices.append(slice(bounds[first][0] * step, bounds[first][1] * step))
        return tuple(slices)

    def _inner(self) -> dict[str, int]:
        """The sizes that einops cannot see: of the inner letter of an axis with two."""
        return {letter: self.sizes[letter] for axis in _axes(self._sides()[0]) for letter in axis[1:]}

    def _sides(self) -> tuple[str, str]:
        left, _, right = self.pattern.partition(" -> ")
        return left, right


def _axes(side: str) -> list[list[str]]:
    """The letters of each axis: "M (H D)" gives [["M"], ["H", "D"]]."""
    return [group.strip("()").split() for group in re.findall(r"\(.*?\)|\w", side)]


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    """The tensors that a checkpoint of this model holds, by name, in the order of its layers."""
    sizes = dict(
        V=config.vocab_size,
        M=config.model_dim,
        H=config.num_heads,
        K=config.num_kv_heads,
        D=config.head_dim,
        F=config.ffn_dim,
    )
    order = list(_NAMES)
    found: list[tuple[tuple[int, int], Tensor]] = []
    for path in flatten_dict(parameter_specs(config)):
        run, parameter = config.loop.run_of(path), ".".join(path)
        key = parameter if run is None else ".".join(("layers", *path[len(run.path) :]))
        template, pattern = _NAMES[key]
        for place, number in enumerate((None,) if run is None else run.numbers):
            layer = None if run is None else place
            name = template.format(number)
            tensor = Tensor(name=name, parameter=parameter, layer=layer, pattern=pattern, sizes=sizes)
            # the embedding, layer by layer, what follows them
            first = number if number is not None else -1 if key == order[0] else config.num_layers
            found.append(((first, order.index(key)), tensor))
    return {tensor.name: tensor for _, tensor in sorted(found, key=lambda each: each[0])}


def leaf(params: Any, parameter: str) -> Any:
    """The array of a nested dict that lies at a dotted path."""
    for key in parameter.split("."):
        params = params[key]
    return params
