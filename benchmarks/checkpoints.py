"""Checkpoints of real models' shapes with random weights, in Hugging Face format.

Examples:
    python benchmarks/checkpoints.py --shape smollm2-135m --output /tmp/smollm2-135m
    python benchmarks/checkpoints.py --shape llama-8b --dtype bf16 --output /tmp/llama-8b

Weights are drawn and written piece by piece, so an 8B checkpoint takes no more memory than a small one. A tensor's
values depend on the seed and its name alone: checkpoints of one shape in several dtypes are one model, rounded.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import fail, make_parser, parameter_count

DTYPES = {"fp32": ("float32", "F32", 4), "fp16": ("float16", "F16", 2), "bf16": ("bfloat16", "BF16", 2)}
SHARD_BYTES = 1_000_000_000
PIECE = 1 << 24  # values drawn at once
STD = 0.02  # a trained model's scale: activations stay finite in fp16


def _llama(
    layers: int, hidden: int, ffn: int, heads: int, kv: int, vocab: int, tied: bool = True, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **more,
    }


def _llama3(factor: float) -> dict[str, Any]:
    """Positions of Llama 3.1 (factor 8) and 3.2 (factor 32)."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {"max_position_embeddings": 131072, "rope_parameters": rope}


def _plain(theta: float, positions: int) -> dict[str, Any]:
    return {"max_position_embeddings": positions, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(2, 64, 128, 4, 2, 512, **_plain(10000.0, 2048)),
    "smollm2-135m": _llama(30, 576, 1536, 9, 3, 49152, **_plain(100000.0, 8192)),
    "smollm2-135m-128k": _llama(30, 576, 1536, 9, 3, 128256, **_plain(100000.0, 8192)),  # a Llama 3 vocabulary
    "llama-1b": _llama(16, 2048, 8192, 32, 8, 128256, **_llama3(32.0)),
    "llama-3b": _llama(28, 3072, 8192, 24, 8, 128256, **_llama3(32.0)),
    "llama-8b": _llama(32, 4096, 14336, 32, 8, 128256, tied=False, **_llama3(8.0)),
    "qwen3-0.6b": {
        **_llama(28, 1024, 3072, 16, 8, 151936, **_plain(1000000.0, 40960)),
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
    },
}


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of every weight of a Llama-like config, in file order."""
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{at}self_attn.o_proj.weight", (hidden, queries)
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


def values(name: str, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> Iterator[bytes]:
    """The tensor's bytes, piece by piece: ones for norms, else normal with deviation STD."""
    count = math.prod(shape)
    if len(shape) == 1:
        yield np.ones(count, np.float32).astype(dtype).tobytes()
        return
    draw = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    for start in range(0, count, PIECE):
        piece = draw.standard_normal(min(PIECE, count - start), np.float32)
        piece *= STD
        yield piece.astype(dtype).tobytes()


def plan_shards(
    named: list[tuple[str, tuple[int, ...]]], itemsize: int, limit: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Tensors in order, in files of at most `limit` bytes; a larger tensor has a file of its own."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = []
    room = 0
    for name, shape in named:
        size = math.prod(shape) * itemsize
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append((name, shape))
        room -= size
    return shards


def write_shard(path: Path, named: list[tuple[str, tuple[int, ...]]], dtype_name: str, seed: int) -> None:
    """One safetensors file: the header's length, the header, then the tensors one after the other."""
    import ml_dtypes

    numpy_name, code, itemsize = DTYPES[dtype_name]
    dtype = np.dtype(ml_dtypes.bfloat16 if numpy_name == "bfloat16" else numpy_name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in named:
        end = offset + math.prod(shape) * itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in named:
            for piece in values(name, shape, dtype, seed):
                file.write(piece)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE without merges, padded with unused tokens to `vocab_size`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    info = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(info, indent=2))


def write_checkpoint(shape: str, output: Path, dtype: str = "bf16", seed: int = 0, shard: int = SHARD_BYTES) -> None:
    """Write a checkpoint of `shape`. `output` appears when it is whole; it must not exist before."""
    if output.exists():
        fail(f"{output} already exists; remove it, or choose another --output.")
    config = {**SHAPES[shape], "dtype": DTYPES[dtype][0], "torch_dtype": DTYPES[dtype][0]}
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    itemsize = DTYPES[dtype][2]
    shards = plan_shards(list(tensors(config)), itemsize, shard)
    weight_map: dict[str, str] = {}
    for number, named in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_shard(partial / file, named, dtype, seed)
        weight_map.update((name, file) for name, _ in named)
    if len(shards) > 1:
        size = sum(math.prod(dims) * itemsize for _, dims in tensors(config))
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    (partial / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}, indent=2))
    write_tokenizer(partial, config["vocab_size"])
    partial.rename(output)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), required=True, help="the model whose shape to take")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; must not exist")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the weights [default: bf16]")
    parser.add_argument("--seed", type=int, default=0, help="of the weights [default: 0]")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="most bytes of a file [default: 1 GB]")
    args: argparse.Namespace = parser.parse_args()
    write_checkpoint(args.shape, args.output, args.dtype, args.seed, args.shard_bytes)
    files = list(args.output.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    count = parameter_count(args.output)
    print(f"{args.output}: {count:,} parameters, {size / 1e9:.2f} GB in {len(files)} file(s).")


if __name__ == "__main__":
    main()
