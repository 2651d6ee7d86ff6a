"""Checkpoints of real models' shapes with random weights, in Hugging Face format.

    python benchmarks/checkpoints.py --shape smollm2-135m --output /tmp/smollm2-135m
    python benchmarks/checkpoints.py --shape llama-8b --dtype bf16 --output /tmp/llama-8b

Weights are drawn and written shard by shard, so that an 8B checkpoint takes a shard's memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARD_BYTES = 1 << 30


def _llama(layers: int, hidden: int, ffn: int, heads: int, kv: int, vocab: int, tied: bool, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
        "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0, **more,
    }  # fmt: skip


_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA3 = {"max_position_embeddings": 131072, "rope_parameters": _LLAMA3_ROPE}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(2, 64, 128, 4, 2, 512, True, max_position_embeddings=2048),
    "smollm2-135m": _llama(30, 576, 1536, 9, 3, 49152, True, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}),
    "llama-1b": _llama(16, 2048, 8192, 32, 8, 128256, True, head_dim=64, **_LLAMA3),
    "llama-3b": _llama(28, 3072, 8192, 24, 8, 128256, True, head_dim=128, **_LLAMA3),
    "llama-8b": _llama(32, 4096, 14336, 32, 8, 128256, False, head_dim=128, **_LLAMA3),
    "qwen3-0.6b": {
        **_llama(28, 1024, 3072, 16, 8, 151936, True, head_dim=128, max_position_embeddings=40960),
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"],
    },
}  # fmt: skip


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of every weight of a Llama-like config, in file order."""
    hidden, ffn, heads, kv = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    head = config.get("head_dim", hidden // heads)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows in (("q", heads * head), ("k", kv * head), ("v", kv * head)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{at}self_attn.o_proj.weight", (hidden, heads * head)
        if config["model_type"] == "qwen3":
            yield f"{at}self_attn.q_norm.weight", (head,)
            yield f"{at}self_attn.k_norm.weight", (head,)
        for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
            yield f"{at}mlp.{name}_proj.weight", shape
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write_checkpoint(shape: str, output: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Write a sharded checkpoint of `shape` with its config and a byte-level tokenizer."""
    config = {**SHAPES[shape], "dtype": str(dtype).removeprefix("torch."), "rms_norm_eps": 1e-5}
    output.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []

    def flush() -> None:
        if shard:
            save_file(shard, output / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(shard))
            shard.clear()

    for name, dims in tensors(config):
        if len(dims) == 1:
            shard[name] = torch.ones(dims, dtype=dtype)
        else:
            shard[name] = torch.empty(dims, dtype=dtype).normal_(0.0, 0.02, generator=generator)
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (output / f"part-{index}.safetensors").rename(output / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (output / "config.json").write_text(json.dumps(config, indent=2))
    (output / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))
    write_tokenizer(output, config["vocab_size"])


def write_tokenizer(output: Path, vocab_size: int) -> None:
    """A byte-level BPE without merges, padded with unused tokens to at most `vocab_size`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), min(vocab_size, 512))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(output / "tokenizer.json"))
    info = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (output / "tokenizer_config.json").write_text(json.dumps(info))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_checkpoint(args.shape, args.output, DTYPES[args.dtype], args.seed)
    size = sum(f.stat().st_size for f in args.output.glob("*.safetensors"))
    print(f"{args.output}: {size / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
