"""Which tensor of a Hugging Face checkpoint is which parameter, and how its axes lie.

A parameter is named by its path in the model's tree, joined by dots. A pattern says, as einops does, how the axes of
the tensor become those of the parameter (of one layer of it): letters as in `ring_attention`, `(H D)` is one axis, and
D is (d p) or (p d), of the d = D/2 pairs of p = 2 numbers that rotary positions turn.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import einops
import numpy as np
from flax.traverse_util import flatten_dict

from ring_attention.models.hf.config import HFConfig
from ring_attention.models.hf.families import FAMILIES, WRAPPERS
from ring_attention.models.transformer import parameter_specs

LAYER = "{body}layers.{number}."
NAMES: dict[str, tuple[str, str]] = {
    "embed": ("{body}embed_tokens.weight", "V M -> V M"),
    "norm.scale": ("{body}norm.weight", "M -> M"),
    "unembed": ("{head}.weight", "V M -> M V"),
    "layers.attention_norm.scale": (LAYER + "input_layernorm.weight", "M -> M"),
    "layers.attention.query": (LAYER + "self_attn.q_proj.weight", "(H D) M -> M H D"),
    "layers.attention.key": (LAYER + "self_attn.k_proj.weight", "(K D) M -> M K D"),
    "layers.attention.value": (LAYER + "self_attn.v_proj.weight", "(K D) M -> M K D"),
    "layers.attention.out": (LAYER + "self_attn.o_proj.weight", "M (H D) -> H D M"),
    "layers.attention.query_bias": (LAYER + "self_attn.q_proj.bias", "(H D) -> H D"),
    "layers.attention.key_bias": (LAYER + "self_attn.k_proj.bias", "(K D) -> K D"),
    "layers.attention.value_bias": (LAYER + "self_attn.v_proj.bias", "(K D) -> K D"),
    "layers.attention.out_bias": (LAYER + "self_attn.o_proj.bias", "M -> M"),
    "layers.attention.query_norm.scale": (LAYER + "self_attn.q_norm.weight", "D -> D"),
    "layers.attention.key_norm.scale": (LAYER + "self_attn.k_norm.weight", "D -> D"),
    "layers.attention.sinks": (LAYER + "self_attn.sinks", "H -> H"),
    "layers.attention_out_norm.scale": (LAYER + "post_attention_layernorm.weight", "M -> M"),
    "layers.feedforward_norm.scale": (LAYER + "post_attention_layernorm.weight", "M -> M"),
    "layers.feedforward.gate": (LAYER + "mlp.gate_proj.weight", "F M -> M F"),
    "layers.feedforward.up": (LAYER + "mlp.up_proj.weight", "F M -> M F"),
    "layers.feedforward.down": (LAYER + "mlp.down_proj.weight", "M F -> F M"),
    "layers.feedforward.gate_bias": (LAYER + "mlp.gate_proj.bias", "F -> F"),
    "layers.feedforward.up_bias": (LAYER + "mlp.up_proj.bias", "F -> F"),
    "layers.feedforward.down_bias": (LAYER + "mlp.down_proj.bias", "M -> M"),
    "layers.feedforward_out_norm.scale": (LAYER + "post_feedforward_layernorm.weight", "M -> M"),
}
"""What a tensor is called and how its axes lie, unless the row of a family says otherwise."""

PLAIN = ("model.", "lm_head")
_WRAPPED = (("language_model.model.", "language_model.lm_head"), ("model.language_model.", "lm_head"))
"""How names of the layers and of the unembedding begin: in a folder of text, and in multimodal ones."""

_NO_PARAMETER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def is_no_parameter(name: str, config: HFConfig) -> bool:
    """Whether a tensor is no parameter of a model, but is kept: rotary frequencies, or a part that is not text."""
    if _NO_PARAMETER.fullmatch(name):
        return True
    others = WRAPPERS[config.wrapper].tensors if config.wrapper else ()
    file_name = re.fullmatch(r"[\w.]+", name, re.ASCII) is not None  # which it becomes
    return file_name and name.removeprefix("model.").startswith(others)


def prefixes_of(config: HFConfig, stored: Iterable[str]) -> tuple[str, str]:
    """How names of the layers and of the unembedding begin in a folder with these tensors."""
    if not config.wrapper:
        return PLAIN
    names = set(stored)
    return next((each for each in _WRAPPED if f"{each[0]}embed_tokens.weight" in names), _WRAPPED[0])


def tied_copy(prefixes: tuple[str, str]) -> str:
    """A tensor that some files hold beside a tied embedding; it must equal it."""
    return f"{prefixes[1]}.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of a tensor of a checkpoint that are one parameter, or one layer of it.

    Attributes:
      parameter: dotted path in the model's tree.
      layer: index along the parameter's first axis, of the stack; None where it has none of layers.
      pattern: how the axes of the tensor become those of the parameter, or of its layer.
      sizes: of each letter.
      first: its first row in the tensor.
    """

    parameter: str
    layer: int | None
    pattern: str
    sizes: dict[str, int]
    first: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of these rows."""
        return tuple(np.prod([self.sizes[x] for x in axis], dtype=int).item() for axis in _axes(self._sides()[0]))

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameter, or of one layer of it."""
        return tuple(np.prod([self.sizes[x] for x in axis], dtype=int).item() for axis in _axes(self._sides()[1]))

    def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
        """These rows, or a slice of them that `slices` gave, with the parameter's axes; a view where that can be."""
        return einops.rearrange(tensor, self.pattern, **self._inner())

    def to_tensor(self, parameter: np.ndarray) -> np.ndarray:
        """Undo `to_parameter`."""
        left, right = self._sides()
        return einops.rearrange(parameter, f"{right} -> {left}", **self._inner())

    def slices(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slice of the whole tensor that becomes `index` of the parameter, which takes whole heads."""
        left, right = self._sides()
        axes = zip(_axes(right), index, strict=True)
        bounds = {axis[0]: part.indices(self.sizes[axis[0]])[:2] for axis, part in axes if len(axis) == 1}
        slices = []
        for first, *rest in _axes(left):
            step = np.prod([self.sizes[letter] for letter in rest], dtype=int).item()
            slices.append(slice(bounds[first][0] * step, bounds[first][1] * step))
        rows = slice(slices[0].start + self.first, slices[0].stop + self.first)
        return (rows, *slices[1:])

    def _inner(self) -> dict[str, int]:
        """The sizes that einops cannot see: of the inner letters of an axis with several."""
        return {letter: self.sizes[letter] for axis in _axes(self._sides()[0]) for letter in axis[1:]}

    def _sides(self) -> tuple[str, str]:
        left, _, right = self.pattern.partition(" -> ")
        return left, right


def _axes(side: str) -> list[list[str]]:
    """The letters of each axis: "M (H D)" gives [["M"], ["H", "D"]]."""
    return [group.strip("()").split() for group in re.findall(r"\(.*?\)|\w", side)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of a checkpoint, whose rows are one parameter, or several, one after the other."""

    name: str
    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the checkpoint."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])


def tensors_of(config: HFConfig, prefixes: tuple[str, str] = PLAIN) -> dict[str, Tensor]:
    """The tensors that a checkpoint of this model holds, by name, in the order of its layers."""
    model, (body, head) = config.transformer, prefixes
    letters = dict(V="vocab_size", M="model_dim", H="num_heads", K="num_kv_heads", D="head_dim", F="ffn_dim")
    sizes = {letter: getattr(model, field) for letter, field in letters.items()} | dict(d=model.head_dim // 2, p=2)
    table = NAMES | dict(FAMILIES[config.family].names)
    order = list(NAMES)
    found: list[tuple[int, int, str, Part]] = []
    for path in flatten_dict(parameter_specs(model)):
        run, parameter = model.loop.run_of(path), ".".join(path)
        key = parameter if run is None else ".".join(("layers", *path[len(run.path) :]))
        template, pattern = table[key]
        for place, number in enumerate((None,) if run is None else run.numbers):
            layer = None if run is None else place
            name = template.format(body=body, head=head, number=number)
            # the embedding, layer by layer, what follows them
            first = number if number is not None else -1 if key == order[0] else model.num_layers
            part = Part(parameter=parameter, layer=layer, pattern=pattern, sizes=sizes)
            found.append((first, order.index(key), name, part))
    tensors: dict[str, Tensor] = {}
    for *_, name, part in sorted(found, key=lambda each: each[:2]):
        before = tensors[name].parts if name in tensors else ()
        first = sum(each.shape[0] for each in before)
        tensors[name] = Tensor(name=name, parts=(*before, dataclasses.replace(part, first=first)))
    return tensors


def embedding_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor of the embedding."""
    return next(tensor for tensor in tensors.values() if tensor.parts[0].parameter == "embed")


def leaf(params: Any, parameter: str) -> Any:
    """The array of a nested dict that lies at a dotted path."""
    for key in parameter.split("."):
        params = params[key]
    return params
