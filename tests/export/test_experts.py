"""Mixtures of experts as one operator: what is recognised, the operator's layout, float and quantized packages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from llmx.export import ExportOptions, export_model
from llmx.export.experts import Gate, expert_layers, from_operator, gate_of, to_operator, use_operator
from llmx.export.quantization import QuantizationOptions
from llmx.export.weights import SourceModel
from zoo.models import make_model


def layer(apply_gate: Callable[[torch.Tensor], torch.Tensor], **more: Any) -> Any:
    facts = {"has_gate": True, "has_post_expert_norm": False, "has_bias": False, "is_transposed": False}
    return SimpleNamespace(_apply_gate=apply_gate, gate_up_proj=torch.zeros(2, 8, 6), **{**facts, **more})


def silu(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gelu(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate) * up


def test_gates_are_found_by_their_values() -> None:
    assert gate_of(layer(silu)) == Gate(1.0, 0.0, None, False)
    interleaved = Gate(1.702, 1.0, 7.0, True)
    assert gate_of(layer(interleaved, alpha=1.702, limit=7.0)) == interleaved
    assert gate_of(layer(interleaved, alpha=1.7, limit=7.0)) is None
    assert gate_of(layer(gelu)) is None
    assert gate_of(layer(silu, has_gate=False)) is None
    assert gate_of(layer(silu, has_post_expert_norm=True)) is None
    assert gate_of(layer(lambda rows, more: rows)) is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_layout(transposed: bool, interleaved: bool) -> None:
    made = layer(silu, is_transposed=transposed, llmx_gate=Gate(1.0, 0.0, None, interleaved))
    shape = (3, 6, 8) if transposed else (3, 8, 6)
    values = torch.arange(144.0).view(shape)
    there = to_operator(made, "gate_up_proj", values)
    assert there.shape == (3, 8, 6)
    rows = values.transpose(1, 2) if transposed else values
    order = [0, 1, 2, 3, 4, 5, 6, 7] if interleaved else [0, 4, 1, 5, 2, 6, 3, 7]  # gate 0, up 0, gate 1, …
    assert torch.equal(there, rows[:, order])
    assert torch.equal(from_operator(made, "gate_up_proj", there), values)
    assert torch.equal(from_operator(made, "down_proj", to_operator(made, "down_proj", values)), values)


def test_another_activation_is_left_alone() -> None:
    model = make_model("mixtral")
    model.set_experts_implementation("batched_mm")
    for experts in expert_layers(model):
        experts.act_fn = torch.nn.GELU()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_operator(SourceModel(model, {}))
    assert model.config._experts_implementation == "batched_mm"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "weights"), [("gpt_oss", "int4"), ("mixtral", "int8")])
def test_packages(name: str, weights: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Verified while exporting, with int8 activations taken away. gpt_oss: stored transposed, with biases."""
    quantize = QuantizationOptions(weights, block_size=16, symmetric=weights == "int4")
    result = export_model(ExportOptions(str(checkpoint(name)), tmp_path / "p", quantize=quantize))
    assert result.manifest.verification.status == "passed"
    for graph in ("prefill", "decode"):
        found = Counter(node.op_type for node in ir.load(tmp_path / "p" / f"{graph}.onnx").graph)
        assert found["QMoE"] == result.manifest.model.num_layers and not found["MoE"]
    assert result.manifest.quantization["parameters"] > 0.9 * result.manifest.model.parameters


def test_float32_packages_have_the_operator(package: Callable[[str], Path], checkpoint: Any, tmp_path: Path) -> None:
    for name in ("mixtral", "deepseek_v3"):
        found = Counter(node.op_type for node in ir.load(package(name) / "prefill.onnx").graph)
        assert found["MoE"] == {"mixtral": 3, "deepseek_v3": 2}[name]
    half = export_model(ExportOptions(str(checkpoint("mixtral")), tmp_path / "p", dtype="fp16"))
    assert half.manifest.verification.status == "passed"  # the CPU's MoE takes float32 alone
