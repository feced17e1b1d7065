"""Keys of config.json that are not translated: those that must have one value, and those that change nothing.

A family that reads a key of these, or has other conditions for it, says so in its row (`families`). A key that stands
in neither table, nor in the row, is refused: it may change the function.
"""

from typing import Any, NamedTuple


class Fixed(NamedTuple):
    """A key whose other values would need what is not implemented.

    Attributes:
      allowed: values that are as if the key were absent.
      need: why another value is refused.
      remedy: what to do about it.
    """

    allowed: tuple[Any, ...]
    need: str
    remedy: str = "take a checkpoint without it"


_OFF = (None, False)
_ABSENT = (None,)
_RETRAINED = "set it to 0.0 in config.json to go on without it, logits do not change"

FIXED: dict[str, Fixed] = {
    "attention_bias": Fixed(_OFF, "models of this family have no biases there"),
    "mlp_bias": Fixed(_OFF, "models of this family have no biases there"),
    "pretraining_tp": Fixed((None, 1), "products in slices are not implemented", "set it to 1, as transformers 5 does"),
    "partial_rotary_factor": Fixed((None, 1), "rotary positions turn whole heads in this family"),
    "attention_dropout": Fixed((None, 0), "dropout is not implemented in the model", _RETRAINED),
    "attention_probs_dropout_prob": Fixed((None, 0), "dropout is not implemented in the model", _RETRAINED),
    "hidden_dropout": Fixed((None, 0), "dropout is not implemented in the model", _RETRAINED),
    "resid_pdrop": Fixed((None, 0), "dropout is not implemented in the model", _RETRAINED),
    "embd_pdrop": Fixed((None, 0), "dropout is not implemented in the model", _RETRAINED),
    "quantization_config": Fixed(
        _ABSENT, "quantized weights are not implemented", "take the checkpoint in bfloat16, float16 or float32"
    ),
    "compression_config": Fixed(_ABSENT, "quantized weights are not implemented", "take the checkpoint in bfloat16"),
    "rope_interleaved": Fixed(_OFF, "pairs of a head are its two halves here"),
    "rotary_interleaved": Fixed(_OFF, "pairs of a head are its two halves here"),
    "use_qk_norm": Fixed(_OFF, "norms of queries and keys come with the family here"),
    "qk_layernorm": Fixed(_OFF, "norms of queries and keys come with the family here"),
    "embedding_dropout": Fixed((None, 0), "dropout is not implemented in the model", _RETRAINED),
    "ffn_dropout": Fixed((None, 0), "dropout is not implemented in the model", _RETRAINED),
    "neftune_noise_alpha": Fixed((None, 0), "noise on embeddings is not implemented", _RETRAINED),
    "dual_chunk_attention_config": Fixed(_ABSENT, "attention in chunks is not implemented"),
    "quantization": Fixed(
        _ABSENT, "quantized weights are not implemented", "take the checkpoint in bfloat16, float16 or float32"
    ),
    "final_logit_softcapping": Fixed(_ABSENT, "logits have no cap in this family"),
    "attn_logit_softcapping": Fixed(_ABSENT, "attention scores have no cap in this family"),
    "query_pre_attn_scalar": Fixed(_ABSENT, "scores are divided by the root of head_dim in this family"),
    "embedding_multiplier": Fixed((None, 1), "embeddings are not scaled in this family"),
    "logits_scaling": Fixed((None, 1), "logits are not scaled in this family"),
    "residual_multiplier": Fixed((None, 1), "the residual stream is not scaled in this family"),
    "attention_multiplier": Fixed(_ABSENT, "scores are divided by the root of head_dim in this family"),
    "no_rope_layers": Fixed((None, []), "every layer has rotary positions in this family"),
    "is_causal": Fixed((None, True), "a token never sees those after it here"),
    "use_bidirectional_attention": Fixed(_OFF, "a token never sees those after it here"),
    "use_mrope": Fixed(_OFF, "positions have one axis here"),
    "per_layer_config": Fixed((None, {}), "all layers are alike here"),
    "pruned_heads": Fixed((None, {}), "all layers have the same heads here"),
    "is_encoder_decoder": Fixed(_OFF, "there is no encoder here"),
    "add_cross_attention": Fixed(_OFF, "there is no cross attention here"),
    "cross_attention_hidden_size": Fixed(_ABSENT, "there is no cross attention here"),
    "tie_encoder_decoder": Fixed(_OFF, "there is no encoder here"),
    "num_experts": Fixed((None, 0), "mixtures of experts are not implemented"),
    "num_local_experts": Fixed((None, 0), "mixtures of experts are not implemented"),
}

_FOR_READERS = "architectures model_type dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash"
_FOR_PROGRAMS = """
    use_cache use_flash_attn _attn_implementation attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    _experts_implementation output_attentions output_hidden_states return_dict use_return_dict torchscript
    chunk_size_feed_forward use_bfloat16 tf_legacy_loss is_decoder unsloth_version unsloth_fixed is_llama_config
    transformers.js_config cache_implementation kv_cache_dtype gradient_checkpointing use_flash_attention
    use_flash_attention_2 _use_flash_attention_2 _attn_implementation_internal is_composition base_model_tp_plan
    tie_weights_keys
"""
_FOR_A_NEW_MODEL = "initializer_range init_std initializer_factor"
_FOR_TOKENIZERS = """
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class
    max_sequence_length prefix model_max_length tokenizer_model_max_length seq_length max_seq_len max_seq_length
    bos_token eos_token pad_token unk_token padding_side truncation_side tokenizer_padding_side add_bos_token
    add_eos_token chat_template
"""
_FOR_OTHER_TASKS = """
    id2label label2id num_labels problem_type finetuning_task task_specific_params tie_last_hidden_states
    classifier_dropout summary_first_dropout license language tags base_model
"""
_FOR_GENERATING = """
    do_sample temperature top_k top_p typical_p min_length max_length max_new_tokens num_beams num_beam_groups
    diversity_penalty repetition_penalty length_penalty early_stopping no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
"""
_GROUPS = (_FOR_READERS, _FOR_PROGRAMS, _FOR_A_NEW_MODEL, _FOR_TOKENIZERS, _FOR_OTHER_TASKS, _FOR_GENERATING)
IGNORED = frozenset(key for group in _GROUPS for key in group.split())
