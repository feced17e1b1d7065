"""Where the compiler for a TPU slice that is not there puts what a layer keeps; needs it, as `.ci/run` installs it."""

import pytest

from ring_attention.hardware.pods import pod_devices
from ring_attention.models.config import ModelConfig
from ring_attention.planning.programs import compile_step
from ring_attention.training.config import AttentionConfig, MeshConfig, TrainConfig

pytestmark = pytest.mark.pod
LAYERS, SHARD, HEADS, HEAD_DIM = 8, 4096, 8, 128
VECTORS = LAYERS * SHARD * HEADS * HEAD_DIM * 2  # bytes on a device of one bfloat16 [t,M] in each layer


def _memory(remat):
    """(bytes of temporaries on a device, bytes on its host) of a training step."""
    model = ModelConfig(
        vocab_size=1024,
        num_layers=LAYERS,
        model_dim=HEADS * HEAD_DIM,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        ffn_dim=1024,
        compute_dtype="bfloat16",
        remat=remat,
    )
    devices = pod_devices("v5e:2x2")
    attention = AttentionConfig(impl="xla")
    config = TrainConfig(
        name="offload",
        model=model,
        attention=attention,
        mesh=MeshConfig(fsdp=4, sp=1),  # no ring, for the compiler's sake
        batch_size=4,
        seq_len=SHARD,
        num_steps=1000,
    )
    memory = compile_step(config, devices).memory_analysis()
    return memory.temp_size_in_bytes, memory.host_temp_size_in_bytes


def test_offload_moves_what_layers_keep_to_the_host():
    device, host = _memory("attention")
    offloaded, on_host = _memory("offload")
    assert host == 0
    assert 2 * VECTORS <= on_host < 2.2 * VECTORS  # the layer's input and attention's out
    assert offloaded < device - 1.5 * VECTORS  # all but what the layers at hand need, twice to copy beside the work
