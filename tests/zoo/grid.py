"""Small llama-, gemma- and phi-like models, each with one hyper-parameter that an exporter may overlook.

`GRID` names a config for each; `CI` are those that every run compares, the rest are slow. Sliding windows are of 24
positions, chunks of 24 and original lengths of 32: the tests' prompts lie on both sides.
"""

from __future__ import annotations

from typing import Any

import torch

from zoo.models import VOCAB, _factors, widen

WINDOW = 24
ORIGINAL = 32
_IDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LLAMA = {
    **_IDS, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
_GEMMA = {**_LLAMA, "tie_word_embeddings": True, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
_PHI = {k: v for k, v in _LLAMA.items() if k not in ("head_dim", "num_key_value_heads")} | {"hidden_size": 64}
_MLA = {
    **{k: v for k, v in _LLAMA.items() if k != "head_dim"}, "num_key_value_heads": 4, "q_lora_rank": 24,
    "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 20,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
_SLIDING, _FULL, _CHUNKED = "sliding_attention", "full_attention", "chunked_attention"


def _rope(kind: str, half: int, **more: Any) -> dict[str, Any]:
    """rope_parameters of type `kind` for heads of 2 * `half` rotated dimensions."""
    scaled: dict[str, dict[str, Any]] = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
        "longrope": {"original_max_position_embeddings": ORIGINAL, **_factors(half)},
        "llama3": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL,
        },
        "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    return {"rope_type": kind, "rope_theta": 10000.0, **scaled[kind], **more}


def _ropes() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every rotary scaling on each family: of all layers, of the full layers alone, of a part of each head."""
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind in ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional"):
        short = {"max_position_embeddings": ORIGINAL} if kind == "dynamic" else {}
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        cases[f"llama: {kind}"] = "llama", {**_LLAMA, **short, "rope_parameters": _rope(kind, 8)}
        layers = {_SLIDING: plain, _FULL: _rope(kind, 8)}
        cases[f"gemma: {kind} on full layers"] = (
            "gemma3_text",
            {**_GEMMA, **short, "layer_types": [_SLIDING, _FULL], "rope_parameters": layers},
        )
        if kind == "proportional":  # PyTorch's Phi cannot: it rotates whole heads, a part of them by no angle
            cases["phi: proportional"] = "starcoder2", {**_PHI, "rope_parameters": _rope(kind, 8)}
        else:
            parameters = _rope(kind, 4, partial_rotary_factor=0.5)
            cases[f"phi: partial {kind}"] = "phi", {**_PHI, **short, "rope_parameters": parameters}
    yarn = _rope("yarn", 8, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0)
    cases["llama: yarn with an attention factor"] = "llama", {**_LLAMA, "rope_parameters": yarn}
    mscale = _rope("yarn", 8, mscale=1.0, mscale_all_dim=0.7)
    cases["mla: yarn with mscale"] = (
        "deepseek_v3",
        {**_MLA, **_EXPERTS, "first_k_dense_replace": 2, "rope_parameters": mscale},
    )
    cases["phi3: longrope"] = (
        "phi3",
        {
            **_PHI,
            "original_max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **_factors(8)},
        },
    )
    return cases


GRID: dict[str, tuple[str, dict[str, Any]]] = {
    "llama: grouped queries": ("llama", _LLAMA),
    "llama: one key head": ("llama", {**_LLAMA, "num_key_value_heads": 1}),
    "llama: a key head each": ("llama", {**_LLAMA, "num_key_value_heads": 4}),
    "llama: heads wider than the model": ("llama", {**_LLAMA, "head_dim": 40}),
    "llama: heads of 20": ("llama", {**_LLAMA, "head_dim": 20}),
    "llama: biases": ("llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama: tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "llama: epsilon 1e-2": ("llama", {**_LLAMA, "rms_norm_eps": 1e-2}),
    "llama: gelu": ("llama", {**_LLAMA, "hidden_act": "gelu_new"}),
    "llama: query and key norms": ("qwen3", _LLAMA),
    "llama: norms over all heads": ("olmo2", _LLAMA),
    "llama: biases on queries alone": ("qwen2", _LLAMA),
    "llama: clipped projections": ("olmo", {**_LLAMA, "clip_qkv": 0.5}),
    "llama: window without layer_types": ("mistral", {**_LLAMA, "sliding_window": WINDOW}),
    "llama: no window": ("mistral", {**_LLAMA, "sliding_window": None}),
    "llama: window from a layer on": ("qwen2", {**_LLAMA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "llama: window by layer_types": ("ministral", {**_LLAMA, "sliding_window": WINDOW, "layer_types": [_FULL, _SLIDING]}),
    "llama: layers without rotation": ("smollm3", {**_LLAMA, "no_rope_layers": [1, 0]}),
    "llama: window and no rotation": ("cohere2", {**_LLAMA, "sliding_window": WINDOW, "layer_types": [_SLIDING, _FULL], "logit_scale": 0.5}),
    "llama: chunks": ("llama4_text", {**_LLAMA, **_EXPERTS, "intermediate_size_mlp": 96, "attention_chunk_size": WINDOW, "moe_layers": [], "no_rope_layers": [1, 0], "layer_types": [_CHUNKED, _FULL]}),
    "llama: chunks and experts": ("llama4_text", {**_LLAMA, **_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "attention_chunk_size": WINDOW, "interleave_moe_layer_step": 1, "no_rope_layers": [1, 1], "layer_types": [_CHUNKED, _CHUNKED]}),
    "llama: partial rotary": ("stablelm", {**{k: v for k, v in _LLAMA.items() if k != "head_dim"}, "hidden_size": 64, "partial_rotary_factor": 0.25}),
    "llama: partial interleaved rotary": ("glm4", {**_LLAMA, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "llama: interleaved rotary": ("cohere", {**_LLAMA, "use_qk_norm": True, "logit_scale": 0.5}),
    "llama: interleaved rotary in pairs": ("ernie4_5", {**_LLAMA, "use_bias": True}),
    "llama: multipliers": ("granite", {**_LLAMA, "logits_scaling": 2.0, "residual_multiplier": 0.7, "embedding_multiplier": 3.0, "attention_multiplier": 0.4}),
    "llama: experts": ("mixtral", {**_LLAMA, **_EXPERTS}),
    "llama: experts with windows": ("mixtral", {**_LLAMA, **_EXPERTS, "sliding_window": WINDOW}),
    "llama: experts, weights summing to one": ("qwen3_moe", {**_LLAMA, **_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "llama: experts, weights as they are": ("olmoe", {**_PHI, **_EXPERTS, "num_key_value_heads": 2, "norm_topk_prob": False}),
    "llama: a shared expert behind a gate": ("qwen2_moe", {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}),
    "llama: shared experts and groups": ("glm4_moe", {**_LLAMA, **_EXPERTS, "n_shared_experts": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7}),
    "llama: shared expert beside": ("granitemoeshared", {**_LLAMA, **_EXPERTS, "shared_intermediate_size": 40}),
    "llama: sinks": ("gpt_oss", {**_LLAMA, **_EXPERTS, "sliding_window": WINDOW, "layer_types": [_FULL, _FULL], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama: sinks with windows": ("gpt_oss", {**_LLAMA, **_EXPERTS, "sliding_window": WINDOW, "layer_types": [_SLIDING, _FULL], "rope_parameters": _rope("yarn", 8, truncate=False)}),
    "mla: low-rank queries": ("deepseek_v3", {**_MLA, **_EXPERTS, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}),
    "mla: whole queries": ("deepseek_v3", {**_MLA, **_EXPERTS, "q_lora_rank": None, "first_k_dense_replace": 2}),
    "mla: halves instead of pairs": ("deepseek_v3", {**_MLA, **_EXPERTS, "rope_interleave": False, "first_k_dense_replace": 2}),
    "mla: complex rotation": ("deepseek_v2", {**_MLA, **_EXPERTS, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "n_shared_experts": 1}),
    "mla: dense": ("minicpm3", {**_MLA, "scale_emb": 2.0, "scale_depth": 1.4, "dim_model_base": 24}),
    "gemma: soft caps": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "layer_types": [_SLIDING, _FULL]}),
    "gemma: no soft caps": ("gemma2", {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": [_FULL, _SLIDING]}),
    "gemma: layer_types by rule": ("gemma2", _GEMMA),
    "gemma: one key head": ("gemma", {**{k: v for k, v in _GEMMA.items() if k != "sliding_window"}, "num_key_value_heads": 1}),
    "gemma: query and key norms": ("gemma3_text", {**_GEMMA, "layer_types": [_SLIDING, _FULL]}),
    "gemma: every layer slides": ("gemma3_text", {**_GEMMA, "layer_types": [_SLIDING, _SLIDING], "final_logit_softcapping": 4.0}),
    "gemma: windows by pattern": ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2, "num_hidden_layers": 3}),
    "gemma: a table for each layer": ("gemma4_text", {**_GEMMA, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "global_head_dim": 24, "layer_types": [_SLIDING, _FULL], "num_kv_shared_layers": 0}),
    "phi: parallel blocks": ("phi", _PHI),
    "phi: query and key norms": ("phi", {**_PHI, "qk_layernorm": True, "num_key_value_heads": 2}),
    "phi: whole rotary": ("phi", {**_PHI, "partial_rotary_factor": 1.0}),
    "phi: layer norm epsilon": ("phi", {**_PHI, "layer_norm_eps": 1e-2, "num_key_value_heads": 1}),
    "phi3: window without layer_types": ("phi3", {**_PHI, "sliding_window": WINDOW, "num_key_value_heads": 2}),
    "phi3: no window": ("phi3", {**_PHI, "sliding_window": None, "partial_rotary_factor": 0.5}),
    "phi: experts": ("phimoe", {**_PHI, **_EXPERTS, "num_key_value_heads": 2, "sliding_window": WINDOW, "attention_bias": True, "lm_head_bias": True}),
    "phi: window and biases": ("starcoder2", {**_PHI, "num_key_value_heads": 2, "sliding_window": WINDOW, "use_bias": True}),
    "phi: parallel, two norms": ("gpt_neox", {**_PHI, "use_parallel_residual": True, "rotary_pct": 0.25}),
    "phi: sequential": ("gpt_neox", {**_PHI, "use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False}),
    "phi: parallel stablelm": ("stablelm", {**_PHI, "use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True, "num_key_value_heads": 2}),
    "phi: parallel falcon": ("falcon", {**_PHI, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": True}),
    "phi: falcon's one key head": ("falcon", {**_PHI, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False}),
    "phi: falcon in sequence with ALiBi": ("falcon", {**_PHI, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "phi: learned positions": ("gpt_bigcode", {**_IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "multi_query": True}),
    "phi: interleaved rotary": ("gptj", {**_IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
    **_ropes(),
}  # fmt: skip

#: One of each kind that the export treats in a way of its own.
CI = [
    "llama: one key head", "llama: heads of 20", "llama: biases", "llama: query and key norms",
    "llama: window without layer_types", "llama: chunks", "llama: partial interleaved rotary",
    "llama: shared experts and groups", "llama: sinks with windows", "mla: low-rank queries", "gemma: soft caps",
    "gemma: query and key norms", "gemma: yarn on full layers", "phi: parallel blocks", "phi: partial llama3",
    "phi3: window without layer_types", "phi: falcon in sequence with ALiBi",
]  # fmt: skip
#: Those of them that every run compares in 16 bits as well.
CI_16 = ["llama: biases", "mla: low-rank queries", "gemma: soft caps", "phi: falcon in sequence with ALiBi"]


#: Where seed 0 puts a token's second and third experts 1e-4 apart, which 16 bits cannot tell.
SEEDS = {"llama: experts, weights as they are": 6}


def make_grid_model(name: str) -> Any:
    """The PyTorch model of a GRID case, in fp32 and eval mode, with wide weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = GRID[name]
    seed = SEEDS.get(name, 0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    widen(model, seed)
    return model


def experts_alike(model: Any) -> bool:
    """Whether `model` has experts; they get the weights of the first. What is chosen at a tie then makes no difference, and
    logits are continuous in the router's scores, which 16 bits move. (PhiMoE leaves out second experts within 1 % of the
    first, its `router_jitter_noise`; so many that none is left out.)
    """
    found = False
    with torch.no_grad():
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if any(parameter.ndim == 3 for parameter in own):
                found = True
                for parameter in own:
                    parameter.copy_(parameter[:1].expand_as(parameter))
    if found:
        model.config.router_jitter_noise = 10.0
    return found
