"""Small random models of transformers, one or more for each family, with every part that the family has."""

COMMON = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,  # the families' own are beyond this vocabulary, and a row of padding has no gradient
    bos_token_id=1,
    eos_token_id=None,
)
SLIDING, FULL = "sliding_attention", "full_attention"
DEFAULT = dict(rope_type="default", rope_theta=10_000.0)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0)
LONG = dict(max_position_embeddings=256)  # of what is scaled from 32
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
GEMMA = COMMON | dict(head_dim=24, query_pre_attn_scalar=20, sliding_window=8, final_logit_softcapping=3.0)
GEMMA3 = GEMMA | dict(
    num_hidden_layers=8,
    rope_parameters={FULL: dict(rope_type="linear", factor=8.0, rope_theta=1e6), SLIDING: DEFAULT},
)
CONFIGS = {
    "gemma2": ("Gemma2", GEMMA | dict(num_hidden_layers=5, attn_logit_softcapping=5.0)),
    "gemma3_text": ("Gemma3Text", GEMMA3),
    "gemma3": (
        "Gemma3",
        dict(text_config=GEMMA3 | dict(final_logit_softcapping=None), vision_config=VISION, mm_tokens_per_image=4),
    ),
    "qwen2": (
        "Qwen2",
        COMMON
        | LONG
        | dict(num_hidden_layers=5, use_sliding_window=True, sliding_window=8, max_window_layers=3)
        | dict(rope_parameters=YARN | dict(rope_theta=1e6)),
    ),
    "qwen3": (
        "Qwen3",
        COMMON
        | dict(num_hidden_layers=5, head_dim=24, use_sliding_window=True, sliding_window=8, attention_bias=True)
        | dict(layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING]),
    ),
    "olmo2": ("Olmo2", COMMON | dict(num_hidden_layers=3, rope_parameters=DEFAULT | dict(rope_theta=5e5))),
    "olmo3": (
        "Olmo3",
        COMMON
        | LONG
        | dict(num_hidden_layers=6, sliding_window=8)
        | dict(
            rope_parameters={
                FULL: YARN | dict(rope_theta=5e5, attention_factor=1.2079441541679836),
                SLIDING: DEFAULT | dict(rope_theta=5e5),
            }
        ),
    ),
}
"""Name -> (how the classes are called, arguments of the configuration)."""


def random_model(name, seed=2):
    """A float32 model of transformers, in which no norm is one and no bias zero."""
    import torch
    import transformers

    classes, values = CONFIGS[name]
    config = getattr(transformers, f"{classes}Config")(**values)
    torch.manual_seed(seed)
    kind = "ConditionalGeneration" if "text_config" in values else "CausalLM"
    make = getattr(transformers, f"{classes.removesuffix('Text')}For{kind}")._from_config
    model = make(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:  # Gemma's are one more than their weights
                parameter.copy_((0.0 if "gemma" in name else 1.0) + 0.3 * torch.randn_like(parameter))
            elif "embed_tokens" in key or "lm_head" in key:  # Gemma's are multiplied by 8, and would only repeat
                parameter.normal_(0.0, 0.08 if "gemma" in name else 0.25)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
    return model
