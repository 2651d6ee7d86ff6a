"""A small config of any transformers type, made by rule from its default one."""

from __future__ import annotations

from typing import Any

VOCAB = 300
LAYERS = 4  # enough for the layer patterns that types mix

#: Field name -> small value; applied wherever the default config has the field as a number.
RULES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "text_vocab_size", "vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "model_dim", "embed_dim", "embedding_size", "emb_dim"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers", "encoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "attention_head_dim", "swa_head_dim"], 16),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size", "dim_feedforward"], 96),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp", "shared_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "n_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx"], 512),
    **dict.fromkeys(["sliding_window", "attention_window", "attention_window_size", "attention_chunk_size", "local_attention", "window_size"], 24),
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "qk_head_dim": 32,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    "hidden_size_per_layer_input": 16, "lru_width": 64, "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "index_topk": 512,
    "zero_expert_num": 2, "index_n_heads": 2, "index_head_dim": 16, "decoder_start_token_id": 0,
}  # fmt: skip

#: A drafter's text config: its layers read the keys and values of the model that it drafts for.
_ASSISTANT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": LAYERS,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}  # fmt: skip

#: What the rules alone do not make consistent: type -> fields.
OVERRIDES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 16, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"head_dim": 16, "num_key_value_heads": 2},
    "ministral": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "topk_method": "greedy"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
        "logit_scale": 0.5,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * LAYERS},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
    },
    "xmod": {"default_language": "en_XX"},
    "esm": {"vocab_size": VOCAB, "mask_token_id": 1, "pad_token_id": 0},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 32],
        "num_buckets": [2, 4],
    },
    "zaya": {"num_experts_per_tok": 1},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "persimmon": {"num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "qwen4_exp_text": {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4, "num_hidden_layers": 2, "chunk_size": 16},
    "zamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "layers_block_type": None,
        "mamba_dt_rank": 8,
        "n_mamba_heads": 2,
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "blt": {
        "num_hidden_layers": LAYERS,  # of the class that PyTorch counts its cache by
        "encoder_hash_byte_group_vocab": VOCAB,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 64}},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": VOCAB - 1},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "gemma4_assistant": {"text_config": _ASSISTANT, "backbone_hidden_size": 64},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT, "backbone_hidden_size": 64},
}


def shrink(model_type: str, decoder: bool = True) -> Any:
    """The small config of `model_type`; nested configs are shrunk with it. `decoder`: causal or not, where that is a field."""
    from transformers import CONFIG_MAPPING

    config = _shrunk(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))
    if getattr(config, "is_decoder", None) is (not decoder):
        config.is_decoder = decoder
    return config


def _shrunk(kind: Any, overrides: dict[str, Any]) -> Any:
    from transformers import PreTrainedConfig

    try:
        default = kind()
    except Exception:  # its own defaults do not go together
        return kind(**overrides)
    fields = {k: v for k, v in default.__dict__.items() if not k.startswith("_")}
    old_layers = next(
        (fields[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(fields.get(n), int)), None
    )
    mapped = getattr(kind, "attribute_map", {})
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            nested = overrides.get(name, {})
            changed[name] = _shrunk(type(value), {**OVERRIDES.get(value.model_type, {}), **nested})
            overrides = {k: v for k, v in overrides.items() if k != name}
        elif isinstance(value, list) and old_layers and len(value) == old_layers > LAYERS:
            changed[name] = _one_of_each(value)
        elif name in RULES and isinstance(value, (int, float)) and not isinstance(value, bool):
            changed[name] = RULES[name]
    for name, value in RULES.items():  # fields that the config keeps under another name
        if mapped.get(name) in fields and mapped[name] not in changed and isinstance(fields[mapped[name]], int):
            changed[mapped[name]] = value
    if fields.get("num_attention_heads") == fields.get("num_key_value_heads") and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    changed.update(overrides)
    return kind(**changed)


def _one_of_each(values: list[Any]) -> list[Any]:
    """LAYERS of the list's entries, every kind among them, in their order."""
    kinds = list(dict.fromkeys(map(repr, values)))
    firsts = sorted([repr(v) for v in values].index(kind) for kind in kinds)[:LAYERS]
    rest = [i for i in range(len(values)) if i not in firsts]
    return [values[i] for i in sorted(firsts + rest[: LAYERS - len(firsts)])]
