"""Small Hugging Face checkpoints, made without torch: random tensors in the layouts that people publish."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

SHAPE = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], **SHAPE)
MISTRAL = dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=24, **SHAPE)
QWEN2 = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True, **SHAPE)
QWEN3 = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=12, **SHAPE)


def tensors_for(values, seed=0):
    """Random float32 tensors for a config.json, by name; written out by hand, to compare a table with."""
    rng = np.random.default_rng(seed)
    M, F, V = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    H, K = values["num_attention_heads"], values["num_key_value_heads"]
    D = values.get("head_dim", M // H)
    layer = {
        "input_layernorm.weight": (M,),
        "post_attention_layernorm.weight": (M,),
        "self_attn.q_proj.weight": (H * D, M),
        "self_attn.k_proj.weight": (K * D, M),
        "self_attn.v_proj.weight": (K * D, M),
        "self_attn.o_proj.weight": (M, H * D),
        "mlp.gate_proj.weight": (F, M),
        "mlp.up_proj.weight": (F, M),
        "mlp.down_proj.weight": (M, F),
    }
    if values["model_type"] == "qwen2":
        layer |= {f"self_attn.{x}_proj.bias": (n * D,) for x, n in (("q", H), ("k", K), ("v", K))}
    if values["model_type"] == "qwen3":
        layer |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
    shapes = {"model.embed_tokens.weight": (V, M), "model.norm.weight": (M,)}
    for i in range(values["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not values.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, M)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_folder(path, values, *, dtype="float32", shards=1, tensors=None):
    """Write config.json, safetensors files and their index, and a few small files; return the tensors in `dtype`."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(values, indent=4, sort_keys=True))  # other spaces than ours
    tensors = tensors_for(values) if tensors is None else tensors
    tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    names = sorted(tensors)
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        held = {name: tensors[name] for name in names if places[name] == file}
        save_file(held, path / (file if shards > 1 else "model.safetensors"), metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "generation_config.json").write_text('{"do_sample": true}')
    (path / "tokenizer_config.json").write_text("{}\n\n")
    (path / "LICENSE").write_bytes(b"\xff\x00 not text")
    return tensors


def contents(path):
    """The bytes of every file below a folder, by relative path."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
