"""A Llama or Qwen3 checkpoint as GGUF for llama.cpp. Runs in the peer's environment (`gguf`, numpy, `llama_cpp`).

Examples:
    python benchmarks/gguf_writer.py CHECKPOINT OUTPUT.gguf              # f32
    python benchmarks/gguf_writer.py F32.gguf OUTPUT.gguf --type q4_0    # by llama.cpp's own quantizer

Tensor by tensor, so an 8B model takes the memory of its largest tensor. There is no vocabulary in the file: the
benchmarks pass token ids.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

QUANTIZED = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Checkpoint:
    """The tensors of a folder of safetensors, read one at a time as float32."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._places: dict[str, tuple[np.memmap, dict[str, Any], int]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            data = np.memmap(file, np.uint8, "r")
            (size,) = struct.unpack("<Q", data[:8].tobytes())
            for name, info in json.loads(data[8 : 8 + size].tobytes()).items():
                if name != "__metadata__":
                    self._places[name] = (data, info, 8 + size)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(info["shape"]) for name, (_, info, _) in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        data, info, base = self._places[name]
        start, end = (base + offset for offset in info["data_offsets"])
        raw = data[start:end]
        if info["dtype"] == "BF16":
            array = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            array = raw.view({"F32": np.float32, "F16": np.float16}[info["dtype"]]).astype(np.float32)
        return array.reshape(info["shape"])

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def rope(self) -> dict[str, Any]:
        """transformers 5 writes `rope_parameters`; earlier ones `rope_theta` and `rope_scaling`."""
        rope = dict(self.config.get("rope_parameters") or self.config.get("rope_scaling") or {})
        rope.setdefault("rope_theta", self.config.get("rope_theta", 10000.0))
        return rope


def target_name(name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor."""
    module = name.removesuffix(".weight")
    if module in TOP:
        return f"{TOP[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    if rest not in LAYER:
        sys.exit(f"gguf_writer.py knows no place for {name}: it writes Llama and Qwen3 checkpoints alone.")
    return f"blk.{layer}.{LAYER[rest]}.weight"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """For llama: llama.cpp rotates neighbouring pairs where Hugging Face rotates halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """What each rotary frequency is divided by: 1 for the high ones, `factor` for the low, smooth between."""
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        factors.append(1 / ((1 - min(max(smooth, 0), 1)) / factor + min(max(smooth, 0), 1)))
    return np.array(factors, np.float32)


def write(source: Checkpoint, output: Path) -> None:
    config, rope = source.config, source.rope
    kind = config["model_type"]
    scaling = rope.get("rope_type", "default")
    if kind not in ("llama", "qwen3") or scaling not in ("default", "llama3"):
        sys.exit(f"gguf_writer.py writes Llama and Qwen3 checkpoints, not {kind} with {scaling} positions.")
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(output, kind)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(source.head_dim)
    writer.add_value_length(source.head_dim)
    writer.add_rope_dimension_count(source.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    factors = llama3_factors(rope, source.head_dim) if scaling == "llama3" else None
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    shapes = source.shapes()
    for name, shape in shapes.items():
        writer.add_tensor_info(target_name(name), shape, np.dtype(np.float32), math.prod(shape) * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name in shapes:
        array = source.read(name)
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = permute(array, heads if name.endswith("q_proj.weight") else kv)
        writer.write_tensor_data(np.ascontiguousarray(array))
    writer.close()


def quantize(source: Path, output: Path, kind: str) -> None:
    """llama.cpp's own quantization with its defaults (the embedding of a tied model is the output, kept finer)."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, QUANTIZED[kind])
    if llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), params):
        sys.exit(f"llama.cpp could not quantize {source} to {kind}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint folder, or for --type q8_0 and q4_0 an f32 GGUF")
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=["f32", *QUANTIZED], default="f32")
    args = parser.parse_args()
    if args.type == "f32":
        write(Checkpoint(args.source), args.output)
    else:
        quantize(args.source, args.output, args.type)


if __name__ == "__main__":
    main()
