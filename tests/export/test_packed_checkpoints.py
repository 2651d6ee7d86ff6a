"""Checkpoints quantized already, written here value by value from their documented layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from llmx.cli import main
from llmx.export import ExportOptions, export_model
from llmx.export.blocks import Blocks, Scheme, round_to_nearest
from llmx.export.checkpoint import open_checkpoint
from llmx.export.dequantized import quantized_matrices, use_package_weights
from llmx.export.packed_checkpoints import PackedTensor
from llmx.export.quantization import QuantizationOptions
from llmx.export.weights import build_source, load_model
from llmx.runtime import load_manifest
from llmx.runtime.errors import UnsupportedModelError
from zoo.models import make_model, write_tokenizer

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ: the column whose value lies in the n-th four bits


def pack(values: np.ndarray, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """int32 [n, m * bits / 32] of [n, m], bit by bit."""
    per = 32 // bits
    rows, columns = values.shape
    packed = np.zeros((rows, -(-columns // per)), np.uint32)
    for row in range(rows):
        for column in range(columns):
            place = (order or list(range(per))).index(column % per)
            packed[row, column // per] |= np.uint32(int(values[row, column]) & ((1 << bits) - 1)) << np.uint32(
                bits * place
            )
    return torch.from_numpy(packed.view(np.int32).copy())


def gptq(blocks: Blocks, less_one: bool) -> dict[str, torch.Tensor]:
    bits, columns = blocks.scheme.bits, blocks.codes.shape[1]
    zeros = zeros_of(blocks) - int(less_one)
    return {
        "qweight": pack_down(blocks.codes.numpy().T, bits),
        "qzeros": pack(zeros.T, bits),
        "scales": blocks.scales.T.contiguous().half(),
        "g_idx": (torch.arange(columns) // blocks.scheme.block_size).int(),
    }


def pack_down(values: np.ndarray, bits: int) -> torch.Tensor:
    """int32 [n * bits / 32, m] of [n, m], packed along the first axis."""
    return pack(np.ascontiguousarray(values.T), bits).T.contiguous()


def awq(blocks: Blocks) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack(blocks.codes.numpy().T, 4, AWQ_ORDER),
        "qzeros": pack(zeros_of(blocks).T, 4, AWQ_ORDER),
        "scales": blocks.scales.T.contiguous().half(),
    }


def compressed(blocks: Blocks) -> dict[str, torch.Tensor]:
    bits = blocks.scheme.bits
    tensors = {
        "weight_packed": pack(blocks.codes.numpy(), bits),
        "weight_scale": blocks.scales.bfloat16(),
        "weight_shape": torch.tensor(blocks.codes.shape),
    }
    if blocks.zero_points is not None:
        tensors["weight_zero_point"] = pack_down(blocks.zero_points.numpy(), bits)
    return tensors


def zeros_of(blocks: Blocks) -> np.ndarray:
    """int64 [rows, blocks]."""
    if blocks.zero_points is None:
        return np.full(tuple(blocks.scales.shape), blocks.scheme.middle)
    return blocks.zero_points.numpy().astype(np.int64)


def channel_wise(weight: torch.Tensor, bits: int) -> Blocks:
    """A symmetric scale for each row."""
    columns = weight.shape[1]
    scale = (weight.abs().amax(1, keepdim=True) / ((1 << (bits - 1)) - 1)).bfloat16().float()
    codes = ((weight / scale).round() + (1 << (bits - 1))).clamp(0, (1 << bits) - 1).to(torch.uint8)
    return Blocks(Scheme(bits, columns, True), codes, scale, None)


def ct_config(bits: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    } | more


FORMATS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False},
        lambda w: round_to_nearest(w, Scheme(4, 16, False), torch.float16),
        lambda b: gptq(b, True),
    ),
    "gptq-v2-int8": (
        {"quant_method": "gptq", "bits": 8, "group_size": 16, "sym": True, "checkpoint_format": "gptq_v2"},
        lambda w: round_to_nearest(w, Scheme(8, 16, True), torch.float16),
        lambda b: gptq(b, False),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "GEMM"},
        lambda w: round_to_nearest(w, Scheme(4, 16, False), torch.float16),
        awq,
    ),
    "ct": (ct_config(4, True), lambda w: round_to_nearest(w, Scheme(4, 16, True), torch.bfloat16), compressed),
    "ct-asymmetric": (
        ct_config(4, False),
        lambda w: round_to_nearest(w, Scheme(4, 16, False), torch.bfloat16),
        compressed,
    ),
    "ct-channel-int8": (ct_config(8, True), lambda w: channel_wise(w, 8), compressed),
}  # fmt: skip


def write(name: str, folder: Path, config: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """A llama whose layers are quantized as `name` says, its head and embedding not; the layers' weights."""
    from safetensors.torch import save_file

    quantization, quantize, stored = FORMATS[name]
    model = make_model("llama")
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        if ".layers." in key and value.ndim == 2:
            blocks = quantize(value)
            weights[key] = blocks.dequantized()
            tensors |= {key.removesuffix("weight") + part: t.contiguous() for part, t in stored(blocks).items()}
        else:
            tensors[key] = value.clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain = model.config.to_dict() | {
        "quantization_config": config or quantization,
        "architectures": ["LlamaForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(plain))
    write_tokenizer(folder)
    return weights


@pytest.mark.parametrize("name", FORMATS)
def test_values(name: str, tmp_path: Path) -> None:
    weights = write(name, tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    assert checkpoint.packed is not None and checkpoint.packed.method == FORMATS[name][0]["quant_method"]
    parameters = dict(load_model(checkpoint, torch.float32).named_parameters())
    assert len(weights) == 3 * 7
    for key, want in weights.items():
        torch.testing.assert_close(parameters[key].data, want, rtol=0, atol=0)
    torch.testing.assert_close(parameters["lm_head.weight"].data, make_model("llama").lm_head.weight.data)
    packed = [
        t for t in build_source(checkpoint, torch.float32, None, None).stored.values() if isinstance(t, PackedTensor)
    ]
    assert len(packed) == 3 * 7
    symmetric = name in ("gptq-v2-int8", "ct", "ct-channel-int8")
    for tensor in packed:
        columns = tensor.shape[1]
        size = columns & -columns if "channel" in name else 16  # a channel is as few blocks as can be
        assert tensor.scheme == Scheme(8 if "int8" in name else 4, size, symmetric)


@pytest.mark.parametrize("name", ["gptq", "ct-channel-int8"])
def test_export(name: str, tmp_path: Path) -> None:
    weights = write(name, tmp_path / "model")
    manifest = export_model(ExportOptions(str(tmp_path / "model"), tmp_path / "package")).manifest
    assert manifest.verification.status == "passed"
    facts = manifest.quantization
    assert facts["method"] == FORMATS[name][0]["quant_method"] + " (checkpoint)" and facts["matrices"] == 3 * 7
    assert facts["head_bits"] is None and facts["bits"] in (4, 8)
    assert facts["quality"]["mean_kl"] < 1e-3  # of int8 activations alone
    model = make_model("llama", seed=1)
    use_package_weights(
        model, quantized_matrices(tmp_path / "package", load_manifest(tmp_path / "package")), check=False
    )
    for key, want in weights.items():
        torch.testing.assert_close(dict(model.named_parameters())[key].data, want, rtol=0, atol=0)


def test_the_rest_can_be_quantized(tmp_path: Path) -> None:
    write("awq", tmp_path / "model")
    options = QuantizationOptions("int4", block_size=16)
    manifest = export_model(
        ExportOptions(str(tmp_path / "model"), tmp_path / "package", verify=False, quantize=options)
    ).manifest
    assert manifest.quantization["matrices"] == 3 * 7 + 2 and manifest.quantization["head_bits"] == 8
    assert manifest.quantization["method"] == "awq (checkpoint)"


def refused(config: dict[str, Any], message: str, tmp_path: Path, *arguments: str, **changed: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    write("gptq", tmp_path / "model", config)
    if changed:
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        part = "model.layers.1.mlp.up_proj.g_idx"
        save_file(
            tensors | {part: changed["g_idx"]}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"}
        )
    result = CliRunner().invoke(
        main, ["export", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "p"), *arguments]
    )
    [last] = result.stderr.strip().splitlines()[-1:]
    assert result.exit_code == 1 and last.startswith("Error: ") and message in last and not (tmp_path / "p").exists()


GPTQ = FORMATS["gptq"][0]
CT = ct_config(4, True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
        ({**GPTQ, "bits": 3}, "3 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({**CT, "format": "float-quantized"}, "float-quantized"),
        (ct_config(2, True), "4 or 8 bits"),
        (
            {**CT, "config_groups": {"a": {**CT["config_groups"]["group_0"], "input_activations": {"num_bits": 8}}}},
            "activations",
        ),
    ],
)
def test_other_formats_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(config, message, tmp_path)


def test_act_order_is_refused(tmp_path: Path) -> None:
    refused(GPTQ, "act-order", tmp_path, g_idx=torch.arange(48).flip(0).int() // 16)


def test_adapters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    refused(GPTQ, "already quantized, and an adapter", tmp_path, "--adapter", str(tmp_path / "adapter"))


def test_gptq_needs_the_original(tmp_path: Path) -> None:
    refused(GPTQ, "needs the original weights", tmp_path, "--quantize", "int4", "--quantize-method", "gptq")


def test_layers_without_their_tensors(tmp_path: Path) -> None:
    write("gptq", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(UnsupportedModelError, match="do not belong to the model's layers"):
        build_source(open_checkpoint(str(tmp_path / "model")), torch.float32, None, None)
