"""A Llama checkpoint as GGUF for llama.cpp. Runs in the peer's environment (`gguf`, numpy, safetensors' format).

    python benchmarks/gguf_writer.py CHECKPOINT OUTPUT.gguf [--type f32|q8_0|q4_0]
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import gguf
import numpy as np

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        (size,) = struct.unpack("<Q", data[:8].tobytes())
        for name, info in json.loads(data[8 : 8 + size].tobytes()).items():
            if name == "__metadata__":
                continue
            start, end = (8 + size + o for o in info["data_offsets"])
            raw = data[start:end]
            if info["dtype"] == "BF16":
                array = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                array = raw.view({"F32": np.float32, "F16": np.float16}[info["dtype"]]).astype(np.float32)
            tensors[name] = array.reshape(info["shape"])
    return tensors


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs where Hugging Face rotates halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output")
    parser.add_argument("--type", choices=list(TYPES), default="f32")
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(args.output, "llama")
    writer.add_context_length(min(config["max_position_embeddings"], 8192))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")  # a dummy: the benchmark passes token ids
    writer.add_token_list([f"<{i}>".encode() for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, array in read(args.checkpoint).items():
        if name in TOP:
            target = TOP[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            part = rest.rsplit(".", 1)[0]
            target = f"blk.{layer}.{LAYER[part]}.weight"
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                array = permute(array, heads if "q_proj" in part else kv)
        kind = TYPES[args.type] if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = array.astype(np.float32) if kind == TYPES["f32"] else gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(target, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
