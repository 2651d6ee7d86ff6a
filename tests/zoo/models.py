"""Tiny checkpoints of real architectures, with random weights and a byte-level tokenizer.

Weights are drawn wider than an untrained model's, so that attention looks at something and best tokens are no ties.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB = 300
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 3,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _scaled(rope_type: str, **parameters: Any) -> dict[str, Any]:
    """A llama whose rotary embedding is scaled. The original length, 32, is crossed by every test."""
    return {**_COMMON, "rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


def _factors(count: int) -> dict[str, list[float]]:
    """Short and long factors that no test can take for each other."""
    return {
        "short_factor": [1.0 + 0.05 * i for i in range(count)],
        "long_factor": [1.5 + 0.7 * i for i in range(count)],
    }


#: name -> config fields; `model_type` is the name's part before "-".
TINY: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "tie_word_embeddings": False},
    "llama-tied": {**_COMMON, "tie_word_embeddings": True},
    "qwen2": {**_COMMON},
    "qwen3": {**_COMMON},
    "mistral": {**_COMMON, "sliding_window": 24},
    "gemma2": {**_COMMON, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_COMMON, "sliding_window": 24, "num_hidden_layers": 4, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "gpt2": {**_GPT2},
    "gpt_neox": {k: v for k, v in _COMMON.items() if k not in ("head_dim", "num_key_value_heads")} | {"hidden_size": 64},
    "glm4": {**_COMMON, "partial_rotary_factor": 0.5},
    "phi3": {**_COMMON, "sliding_window": 24, "hidden_size": 64},
    "olmo2": {**_COMMON},
    "smollm3": {**_COMMON},
    "exaone4": {**_COMMON, "sliding_window": 24, "sliding_window_pattern": 2, "num_hidden_layers": 4},
    "granite": {**_COMMON, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "cohere": {**_COMMON, "logit_scale": 0.5},
    "stablelm": {k: v for k, v in _COMMON.items() if k != "head_dim"} | {"hidden_size": 64},
    "starcoder2": {k: v for k, v in _COMMON.items() if k != "head_dim"} | {"sliding_window": 24},
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama-llama3": _scaled(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "llama-linear": _scaled("linear", factor=4.0),
    "llama-yarn": _scaled("yarn", factor=4.0, original_max_position_embeddings=32),
    "llama-proportional": _scaled("proportional", partial_rotary_factor=0.5, factor=2.0),
    "llama-dynamic": {**_scaled("dynamic", factor=8.0), "max_position_embeddings": 32},
    "llama-longrope": _scaled("longrope", original_max_position_embeddings=32, **_factors(8)),
    "gemma3_text-longrope": {
        **_COMMON, "sliding_window": 24, "num_hidden_layers": 4, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
                **_factors(8),
            },
        },
    },
    "phi3-longrope": {
        **_COMMON, "hidden_size": 64, "original_max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **_factors(8)},
    },
    "bloom": {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    "bart": {
        "vocab_size": VOCAB, "d_model": 48, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 96,
        "max_position_embeddings": 512, "is_decoder": True, "is_encoder_decoder": False, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0, "forced_eos_token_id": None, "architectures": ["BartForCausalLM"],
    },
    "mamba": {
        "vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 8, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0,
    },
    "mamba2": {
        "vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 16, "num_heads": 6, "head_dim": 16,
        "n_groups": 2, "chunk_size": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    },
    "openai-gpt": {
        "vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 0, "pad_token_id": 0,
    },
    "recurrent_gemma": {
        **_COMMON, "lru_width": 48, "num_hidden_layers": 3, "attention_window_size": 24, "sliding_window": 24,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv": {
        "vocab_size": VOCAB, "hidden_size": 48, "attention_hidden_size": 48, "num_hidden_layers": 4, "rescale_every": 2,
        "intermediate_size": 96, "bos_token_id": 0, "eos_token_id": 0,
    },
    "minimax": {
        **_COMMON, "num_hidden_layers": 2, "block_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {
        **{k: v for k, v in _COMMON.items() if k != "head_dim"}, "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_next": {
        **_COMMON, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "gpt_oss": {**_COMMON, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4},
    "deepseek_v3": {
        **{k: v for k, v in _COMMON.items() if k not in ("head_dim", "num_key_value_heads")},
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
}  # fmt: skip

#: The issue's list: what every run of CI compares with PyTorch.
CORE = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "glm4", "mistral"]
#: One of each further kind: experts, sinks, latent attention.
KINDS = ["mixtral", "gpt_oss", "deepseek_v3"]
#: Carried state: ALiBi and positions counted by the cache (`grow`), a recurrence whose prompt goes token by token, one in
#: blocks, short convolutions beside attention (`replace`). Then state that lies elsewhere than in transformers' cache: the
#: tokens alone, attributes of modules, a list of the model's own that begins with -1e30 (and weights that it scales in its
#: first call), a cache of its own class.
CARRIED = ["bloom", "mamba", "mamba2", "lfm2", "openai-gpt", "recurrent_gemma", "rwkv", "minimax"]
#: Every kind of rotary scaling, past its original length.
ROPES = [
    "llama-linear", "llama-llama3", "llama-yarn", "llama-proportional", "llama-dynamic", "llama-longrope", "phi3-longrope",
]  # fmt: skip


def make_config(name: str, **overrides: Any) -> Any:
    """The transformers config of a TINY model."""
    from transformers import CONFIG_MAPPING, AutoConfig

    return AutoConfig.for_model(name if name in CONFIG_MAPPING else name.split("-")[0], **{**TINY[name], **overrides})


def make_model(name: str, seed: int = 0, **overrides: Any) -> Any:
    """The PyTorch model, in fp32 and eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(name, **overrides)).eval()
    widen(model, seed)
    return model


def widen(model: Any, seed: int) -> None:
    """Matrices from N(0, 0.15), vectors from their initial value plus N(0, 0.1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.1)


def save_checkpoint(model: Any, folder: Path, **save: Any) -> Path:
    """Write `model` with a tokenizer whose ids all lie within its vocabulary."""
    model.save_pretrained(folder, **save)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE: end token 0, then the 256 bytes, then a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "the"), ("i", "n"), ("e", "r")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """transformers' greedy `generate`, end tokens ignored: the reference continuation."""
    from llmx.export.verify import greedy as reference

    return reference(model, torch.tensor([prompt]), new_tokens)[0, len(prompt) :].tolist()


_BART = {
    "vocab_size": VOCAB, "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip

#: Encoder-decoders: relative positions and no scaling, learned positions, sinusoids, positions counted by the padding;
#: attention in blocks of the source (whose multiples are sources, too), a decoder of several streams.
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": VOCAB, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 3,
        "num_heads": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 2,
    },
    "bart": _BART,
    "marian": _BART,
    "m2m_100": _BART,
    "led": {
        **_BART, "encoder_layers": 1, "decoder_layers": 2, "attention_window": 8, "max_encoder_position_embeddings": 128,
        "max_decoder_position_embeddings": 128,
    },
    "prophetnet": {
        "vocab_size": VOCAB, "hidden_size": 48, "encoder_ffn_dim": 96, "num_encoder_layers": 2,
        "num_encoder_attention_heads": 4, "decoder_ffn_dim": 96, "num_decoder_layers": 2, "num_decoder_attention_heads": 4,
        "max_position_embeddings": 128, "ngram": 2, "num_buckets": 8, "relative_max_distance": 24, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2,
    },
}  # fmt: skip


def make_seq2seq(name: str, seed: int = 0) -> Any:
    """The PyTorch model of a SEQ2SEQ config, in fp32 and eval mode."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **SEQ2SEQ[name])).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    widen(model, seed)
    for key, value in model.state_dict().items():
        if "embed_positions" in key:  # sinusoids are made anew when a checkpoint is loaded
            value.copy_(state[key])
    return model
