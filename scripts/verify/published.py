"""Comparisons that others published, and what the planner predicts for the same."""

import dataclasses
from collections.abc import Callable

from ring_attention.hardware.chips import H800
from ring_attention.hardware.topology import Topology, find_topology
from ring_attention.models.config import ModelConfig
from ring_attention.parallel.strategies import find_strategy
from ring_attention.planning.shares import Share
from ring_attention.planning.step_times import attention_times, step_time
from ring_attention.training.config import AttentionConfig, MeshConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rivals in one setting.

    Attributes:
      name: what was compared, where.
      source: who published it.
      assumed: what the source leaves open.
      published: rival -> figure, relative to the first: how many times as fast.
      predict: the same from the planner.
      close: published figures that differ by less than this factor count as a draw.
    """

    name: str
    source: str
    assumed: str
    published: dict[str, float]
    predict: Callable[[], dict[str, float]]
    close: float = 1.03

    def order_agrees(self) -> bool:
        """Return whether every pair that did not draw is predicted in the same order."""
        predicted, names = self.predict(), list(self.published)
        pairs = [(a, b) for a in names for b in names if self.published[a] > self.published[b] * self.close]
        return all(predicted[a] > predicted[b] for a, b in pairs)


LLAMA_8B = ModelConfig(
    vocab_size=128_256,
    num_layers=32,
    model_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_dim=14_336,
    compute_dtype="bfloat16",
)
LLAMA_7B = dataclasses.replace(LLAMA_8B, vocab_size=32_000, num_kv_heads=32, ffn_dim=11_008)


def _share(topology: Topology, model: ModelConfig, tokens: int, tile: int = 512, **attention) -> Share:
    """A ring of the whole pod."""
    config = TrainConfig(
        name="published",
        model=model,
        seq_len=tokens * topology.devices,
        num_steps=1000,
        mesh=MeshConfig(),
        attention=AttentionConfig(block_q=tile, block_kv=tile, **attention),
    )
    return Share.of(config, topology)


def _relative(seconds: dict[str, float]) -> dict[str, float]:
    first = next(iter(seconds.values()))
    return {name: first / value for name, value in seconds.items()}


def _steps(share: Share, rivals: dict[str, tuple[str, dict]]) -> dict[str, float]:
    """Whole steps by strategy."""
    return _relative({name: step_time(share, find_strategy(*rival)).total for name, rival in rivals.items()})


def _layouts(topology: Topology, model: ModelConfig, tokens: int, passes: tuple[bool, ...], tile: int = 512):
    """Attention alone, by layout."""
    seconds = {}
    for layout in ("contiguous", "striped", "zigzag"):
        share = _share(topology, model, tokens, tile, layout=layout)
        seconds[layout] = sum(attention_times(share, find_strategy("ring"), backward).total for backward in passes)
    return _relative(seconds)


def _layout_steps(topology: Topology, tokens: int, tile: int) -> dict[str, float]:
    """Whole steps of striped over contiguous."""
    ring = find_strategy("ring")
    shares = {layout: _share(topology, LLAMA_7B, tokens, tile, layout=layout) for layout in ("contiguous", "striped")}
    return _relative({layout: step_time(share, ring).total for layout, share in shares.items()})


V5P_64, V5P_16 = find_topology("v5p:4x4x4"), find_topology("v5p:2x2x4")
H800_8 = dataclasses.replace(find_topology("h100:1x8"), name="h800:1x8", chip=H800)
A100_8 = find_topology("a100:1x8")
_RFA = "ring-flash-attention's README"
_STRIPED = "Brandon et al. 2023, Striped Attention"

COMPARISONS = (
    Comparison(
        name="v5p, 2K tokens a device: strategies",
        source="MaxText, MFU 28.5 | 52-53%",
        assumed="Llama 2 7B's heads, 16 devices",
        published={"ring": 1.0, "all_gather": 1.84, "ulysses": 1.84},
        predict=lambda: _steps(_share(V5P_16, LLAMA_7B, 2048), {n: (n, {}) for n in ("ring", "all_gather", "ulysses")}),
    ),
    Comparison(
        name="v5p, 64 devices, 256K tokens: strategies",
        source="MaxText, 10.8 | 9.7 | 9.5 s a step",
        assumed="Llama 3 8B",
        published={"ring": 1.0, "all_gather": 1.11, "usp 16x4": 1.14},
        predict=lambda: _steps(
            _share(V5P_64, LLAMA_8B, 4096),
            {"ring": ("ring", {}), "all_gather": ("all_gather", {}), "usp 16x4": ("usp", {"ulysses_size": 16})},
        ),
    ),
    Comparison(
        name="8 x H800, forward: layouts",
        source=f"{_RFA}, 52 | 74 | 85% of the ideal",
        assumed="8K tokens a device, 32 heads",
        published={"contiguous": 1.0, "striped": 1.42, "zigzag": 1.63},
        predict=lambda: _layouts(H800_8, LLAMA_7B, 8192, (False,)),
    ),
    Comparison(
        name="8 x H800, both passes: layouts",
        source=f"{_RFA}, 54 | 83 | 90%",
        assumed="8K tokens a device, 32 heads",
        published={"contiguous": 1.0, "striped": 1.54, "zigzag": 1.67},
        predict=lambda: _layouts(H800_8, LLAMA_7B, 8192, (False, True)),
    ),
    Comparison(
        name="8 x A100, forward: layouts",
        source=f"{_RFA}, 51 | 70 | 82%",
        assumed="8K tokens a device, 32 heads",
        published={"contiguous": 1.0, "striped": 1.37, "zigzag": 1.61},
        predict=lambda: _layouts(A100_8, LLAMA_7B, 8192, (False,)),
    ),
    Comparison(
        name="8 x A100, both passes: layouts",
        source=f"{_RFA}, 53 | 83 | 90%",
        assumed="8K tokens a device, 32 heads",
        published={"contiguous": 1.0, "striped": 1.57, "zigzag": 1.70},
        predict=lambda: _layouts(A100_8, LLAMA_7B, 8192, (False, True)),
    ),
    Comparison(
        name="8 x A100, 256K tokens: striped",
        source=f"{_STRIPED}, 1.41-1.50",
        assumed="a 7B model, tiles of 2048",
        published={"contiguous": 1.0, "striped": 1.45},
        predict=lambda: _layout_steps(A100_8, 32_768, 2048),
    ),
    Comparison(
        name="16 x TPU v4, 786K tokens: striped",
        source=f"{_STRIPED}, 1.65",
        assumed="a 7B model, tiles of 2048",
        published={"contiguous": 1.0, "striped": 1.65},
        predict=lambda: _layout_steps(find_topology("v4:2x2x4"), 49_152, 2048),
    ),
    Comparison(
        name="8 x A100, 16K tokens: striped",
        source=f"{_STRIPED}, 0.94",
        assumed="a 7B model, tiles of 2048",
        published={"contiguous": 1.0, "striped": 0.94},
        predict=lambda: _layout_steps(A100_8, 2048, 2048),
    ),
)

ATTENTION_ALONE = {
    ("ring", False): {8: 421, 16: 455, 32: 450, 64: 446},
    ("ring", True): {8: 432, 16: 474, 32: 470, 64: 457},
    ("all_gather", False): {8: 602, 16: 590, 32: 593, 64: 580},
    ("all_gather", True): {8: 516, 16: 524, 32: 522, 64: 523},
    ("ulysses", False): {8: 602, 16: 557, 32: 581, 64: 585},
    ("ulysses", True): {8: 583, 16: 560, 32: 573, 64: 585},
    ("usp", False): {8: 593, 16: 589, 32: 594, 64: 588},
    ("usp", True): {8: 571, 16: 569, 32: 574, 64: 571},
}
"""(strategy, backward) -> GPUs -> TFLOP/s of each, of 64:8 heads of 128, 8,192 tokens a GPU, causal, on H100: read off
MagiAttention's charts (docs/source/blog/cp_benchmark.md). The ring is TransformerEngine's.
"""


def planned_rate(strategy: str, devices: int, backward: bool) -> float:
    """What the planner predicts for a number of ATTENTION_ALONE."""
    pod = find_topology(f"h100:{devices // 8}x8")
    model = dataclasses.replace(LLAMA_8B, num_heads=64, model_dim=8192)
    options = {"ulysses_size": min(devices // 2, 8)} if strategy == "usp" else {}
    share = _share(pod, model, 8192, layout="zigzag")
    seconds = attention_times(share, find_strategy(strategy, options), backward).total
    pairs = 8192 * 8192 * devices / 2
    return 4 * 64 * 128 * pairs * (2.5 if backward else 1) / seconds / 1e12
