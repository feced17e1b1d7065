"""One device's share of a training step: its tokens, heads and weights."""

import dataclasses
import functools
import math
from typing import NamedTuple

from ring_attention.attention.device_kind import DeviceKind
from ring_attention.attention.kernels import find_kernel
from ring_attention.attention.kernels.choose import Choice, choose
from ring_attention.checks import ConfigError, require_field
from ring_attention.hardware.topology import Topology
from ring_attention.models.config import ModelConfig
from ring_attention.models.layer_kinds import LayerKind, LayerLoop
from ring_attention.parallel.kernel_choice import choose_context
from ring_attention.parallel.mesh import DATA, FSDP, SEQUENCE, TENSOR, resolve_mesh_shape
from ring_attention.parallel.strategy import Context, Strategy
from ring_attention.parallel.workload import Workload
from ring_attention.training.attend import mask_spec_of, reach_of
from ring_attention.training.attention_config import DOCUMENTS
from ring_attention.training.config import AttentionConfig, TrainConfig
from ring_attention.training.validate import validate_config


class LayerGroup(NamedTuple):
    """The layers of a model that cost a device the same.

    Attributes:
      kind: of these layers, completed by the section attention; its rotary embedding, which costs nothing, left out.
      layers: how many there are.
    """

    kind: LayerKind
    layers: int

    @property
    def name(self) -> str:
        """What these layers see, in words."""
        bounds = [f"window {self.kind.window:,}"] * bool(self.kind.window)
        bounds += [f"chunks of {self.kind.chunk:,}"] * bool(self.kind.chunk)
        return ", ".join(bounds) or "global"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """One device's part of a training step.

    Attributes:
      config: of the run.
      topology: of the pod.
      mesh: sizes of the axes dp, fsdp, sp and tp.
    """

    config: TrainConfig
    topology: Topology
    mesh: dict[str, int]

    @staticmethod
    def of(config: TrainConfig, topology: Topology) -> "Share":
        """Work out a device's part of this config on this pod; raises ConfigError if the pod cannot run it."""
        mesh, impl = resolve_config_mesh(config, topology), config.attention.impl
        validate_config(config, mesh, topology.chip.platform)
        kind = _kind_of(topology)
        require_field(
            impl in ("auto", "xla") or not kind.is_amd,
            "attention.impl",
            impl,
            f"{kind.name} is driven by ROCm, for which there is no such kernel",
            'use impl="auto"',
        )
        return Share(config=config, topology=topology, mesh=mesh)

    @property
    def model(self) -> ModelConfig:
        """The config's model."""
        return self.config.model

    @functools.cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The kinds of layers that cost differently: those of `attention.strategy` first, which reach farthest."""
        model, attention = self.model, self.config.attention
        of_all = (attention.window, attention.chunk, attention.softcap, attention.sinks)
        return _groups_of(model.kinds, model.num_layers, *of_all)

    @property
    def main_kind(self) -> LayerKind:
        """The kind of the first of `groups`."""
        return self.groups[0].kind

    @property
    def strategy(self) -> Strategy:
        """The strategy of the main kind of layer, with its options."""
        return self.strategy_of(self.main_kind)

    def strategy_of(self, kind: LayerKind, strategy: Strategy | None = None) -> Strategy:
        """The strategy of layers of a kind, where `strategy` takes the place of `attention.strategy`."""
        attention = self.config.attention
        return attention.make_local_strategy() if kind.is_local else strategy or attention.make_strategy()

    @property
    def attention(self) -> Context:
        """The kernel and the tiles that the main kind's attention has on the pod; see `attention_of`."""
        return self.attention_of(self.main_kind)

    def attention_of(self, kind: LayerKind) -> Context:
        """The kernel and the tiles of layers of a kind on the pod; "auto" chooses as there, but tests no kernel."""
        return self._attention_of(kind)[0]

    def kernel_reason_of(self, kind: LayerKind) -> str:
        """Why "auto" takes no faster kernel for them on the pod; "" where it takes the fastest, or one is named."""
        return self._attention_of(kind)[1]

    def _attention_of(self, kind: LayerKind) -> tuple[Context, str]:
        model = self.model
        shape = (self.batch, self.tokens, self.heads // model.head_groups, self.head_width)
        kv_heads = self.kv_heads // model.head_groups
        device = _kind_of(self.topology)
        return _choose_attention(self.config.attention, kind, self.ring, device, shape, model.compute_dtype, kv_heads)

    @property
    def itemsize(self) -> int:
        """The bytes of an activation's element."""
        return 2 if self.model.compute_dtype == "bfloat16" else 4

    def keeps_rounding(self, kind: LayerKind) -> bool:
        """Whether what rounding took from the output of such layers' attention is kept for the backward pass."""
        return self.itemsize < 4 and self.attention_of(kind).kernel.float32_out

    @property
    def devices(self) -> int:
        """The number of devices of the whole mesh."""
        return self.topology.devices

    @property
    def slice_mesh(self) -> dict[str, int]:
        """Sizes of the part of the mesh that lies in one slice; slices are the outermost of the mesh."""
        sizes, slices = {}, self.topology.slices
        for axis, size in self.mesh.items():
            sizes[axis] = size // math.gcd(size, slices)
            slices //= math.gcd(size, slices)
        return sizes

    @property
    def owners(self) -> int:
        """The number of devices that a weight is sharded over, beside tp."""
        return self.mesh[FSDP] * self.mesh[SEQUENCE]

    @property
    def width(self) -> int:
        """The part of M that this device keeps of every matrix; the owners' last may be padding."""
        return -(-self.model.model_dim // self.owners)

    @property
    def ring(self) -> int:
        """P, the number of devices that share a sequence."""
        return self.mesh[SEQUENCE]

    @property
    def batch(self) -> int:
        """b, the number of sequences of which this device has a part at once."""
        return self.config.micro_batch_size // (self.mesh[DATA] * self.mesh[FSDP])

    @property
    def tokens(self) -> int:
        """t, the tokens of a sequence on this device."""
        return self.config.seq_len // self.ring

    @property
    def heads(self) -> int:
        """h, the query heads of this device."""
        return self.model.num_heads // self.mesh[TENSOR]

    @property
    def kv_heads(self) -> int:
        """k, the key/value heads of this device."""
        return self.model.num_kv_heads // self.mesh[TENSOR]

    @property
    def head_width(self) -> int:
        """The width of a head in attention, where the shorter of keys and values is padded."""
        return max(self.model.head_dim, self.model.value_dim)

    @property
    def attention_weights(self) -> int:
        """Elements of one layer's attention weights, gathered: query, key, value and out."""
        model = self.model
        return model.model_dim * (model.head_dim + model.value_dim) * (self.heads + self.kv_heads)

    @property
    def ffn_weights(self) -> int:
        """Elements of one layer's feed-forward weights, gathered: gate, up and down."""
        return 3 * self.model.model_dim * self.model.ffn_dim // self.mesh[TENSOR]

    @property
    def vocab_weights(self) -> int:
        """Elements of the embedding, or of the unembedding, gathered."""
        return self.model.vocab_size * self.model.model_dim // self.mesh[TENSOR]

    @functools.cached_property
    def vectors(self) -> int:
        """Parameters of norms, biases and sinks of all layers that this device keeps: no owner shares them out."""
        model, h, k = self.model, self.heads, self.kv_heads
        M, D, E = model.model_dim, model.head_dim, model.value_dim
        norms = {"both": 4, "parallel": 1}.get(model.norm_place, 2) * M
        norms += (D * (h + k) if model.qk_norm_across else 2 * D) * model.qk_norm
        biases = (D * (h + k) + E * k) * model.qkv_bias + M * model.out_bias
        biases += (2 * model.ffn_dim // self.mesh[TENSOR] + M) * model.ffn_bias
        return model.num_layers * (norms + biases) + sum(h * group.layers for group in self.groups if group.kind.sinks)

    @property
    def own_layers(self) -> int:
        """Parameters of layers that this device keeps: its share of their matrices, and `vectors`."""
        matrices = self.model.num_layers * (self.attention_weights + self.ffn_weights)
        return matrices // self.model.model_dim * self.width + self.vectors

    @property
    def own_parameters(self) -> int:
        """Parameters that this device keeps: those of layers, its share of the vocabulary, and the last norm."""
        vocabulary = self.model.vocab_tables * self.vocab_weights // self.model.model_dim * self.width
        return self.own_layers + vocabulary + self.model.model_dim

    def work(self, kind: LayerKind | None = None, **changes) -> Workload:
        """Describe one layer's attention, by default of the main kind, for the strategies' own figures."""
        fields = dict(
            seq_len=self.config.seq_len,
            devices=self.ring,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_width,
            batch=self.batch,
            itemsize=self.itemsize,
            layout=self.config.attention.static_layout,
            window=reach_of(self.config.attention, kind or self.main_kind),
            segments=True,
            count_hops=self.config.attention.layout == DOCUMENTS,
        )
        return Workload(**(fields | changes))


@functools.lru_cache(maxsize=256)
def _groups_of(
    kinds: tuple[LayerKind, ...], num_layers: int, window: int, chunk: int, softcap: float, sinks: bool
) -> tuple[LayerGroup, ...]:
    of_all = LayerKind(window=window, chunk=chunk, softcap=softcap, sinks=sinks)
    layers: dict[LayerKind, int] = {}
    for run in LayerLoop.of([kind.completed(of_all) for kind in kinds], num_layers).runs:
        kind = dataclasses.replace(run.kind, rope=None)
        layers[kind] = layers.get(kind, 0) + run.count
    groups = [LayerGroup(kind, number) for kind, number in layers.items()]
    return tuple(sorted(groups, key=lambda group: (group.kind.is_local, -(group.kind.reach or math.inf))))


def _kind_of(topology: Topology) -> DeviceKind:
    return DeviceKind(topology.chip.platform, topology.chip.kinds[0])


@functools.lru_cache(maxsize=16_384)
def _choose_attention(
    attention: AttentionConfig,
    layers: LayerKind,
    ring: int,
    kind: DeviceKind,
    shape: tuple[int, ...],
    dtype: str,
    kv_heads: int,
) -> tuple[Context, str]:
    """Choose kernel and tiles for one device's attention, and say why "auto" takes no faster kernel."""
    reasons = [""]

    def choose_untested(impl, kind, accepts):
        choice = Choice(impl) if impl != "auto" else choose(kind, accepts, lambda kernel, kind: None)
        reasons.append(choice.reason)
        return find_kernel(choice.impl)

    context = choose_context(
        attention.make_local_strategy() if layers.is_local else attention.make_strategy(),
        attention.impl,
        attention.block_sizes,
        axis_name=SEQUENCE,
        layout=attention.make_layout(ring),
        kind=kind,
        shape=shape,
        dtype=dtype,
        kv_heads=kv_heads,
        make_mask=lambda: mask_spec_of(attention, layers, shape[2]),
        choose=choose_untested,
    )
    return context, reasons[-1]


def resolve_config_mesh(config: TrainConfig, topology: Topology) -> dict[str, int]:
    """Find the sizes of the mesh axes on this pod; raises ConfigError if they do not multiply to its devices."""
    try:
        return resolve_mesh_shape(dataclasses.asdict(config.mesh), topology.devices)
    except ValueError as error:
        raise ConfigError(f"mesh: {error}; {topology.name} has {topology.devices}") from error
