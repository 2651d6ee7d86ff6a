"""GPTQ: outputs on the calibration inputs change less than by rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmx.export import ExportOptions, export_model, quality
from llmx.export.blocks import Scheme, round_to_nearest
from llmx.export.dequantized import quantized_matrices, use_package_weights
from llmx.export.gptq import gptq
from llmx.export.quantization import QuantizationOptions
from llmx.runtime.errors import ExportError
from zoo.models import make_model


def correlated(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(rows, columns // 4, generator=generator) @ mixing
    return inputs + 0.1 * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("scheme", [Scheme(4, 16, True), Scheme(4, 32, False), Scheme(4, 256, True)], ids=str)
@pytest.mark.parametrize("columns", [96, 300])
def test_outputs_change_less(scheme: Scheme, columns: int) -> None:
    inputs = correlated(512, columns)
    weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(1))
    nearest = round_to_nearest(weight, scheme, torch.float32)
    chosen = gptq(weight, inputs.T @ inputs / len(inputs), scheme, torch.float32)
    assert chosen.codes.shape == weight.shape and chosen.scales.shape == nearest.scales.shape

    def error(rounded: torch.Tensor) -> float:
        return float((inputs @ (rounded - weight).T).square().mean())

    assert error(chosen.dequantized()) < 0.5 * error(nearest.dequantized())


def test_without_correlation_it_rounds_to_nearest() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    scheme = Scheme(4, 16, True)
    nearest = round_to_nearest(weight, scheme, torch.float32)
    assert torch.equal(gptq(weight, torch.eye(64), scheme, torch.float32).codes, nearest.codes)
    assert torch.equal(gptq(weight, torch.zeros(64, 64), scheme, torch.float32).codes, nearest.codes)  # dead inputs


def test_an_export_is_calibrated(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "_CALIBRATION", (32, 24))
    options = QuantizationOptions("int4", block_size=16, method="gptq")
    result = export_model(ExportOptions(str(checkpoint("llama")), tmp_path / "p", quantize=options))
    assert result.manifest.verification.status == "passed" and not result.warnings
    assert result.manifest.quantization["method"] == "gptq" and "calibrate" in result.seconds
    nearest = make_model("llama")
    chosen = make_model("llama")
    use_package_weights(chosen, quantized_matrices(tmp_path / "p", result.manifest))
    ids = torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = nearest(ids).logits
        for name, parameter in nearest.named_parameters():
            if parameter.ndim == 2:
                bits = 8 if "layers" not in name else 4
                parameter.copy_(round_to_nearest(parameter, Scheme(bits, 16, True), torch.float32).dequantized())
        errors = [float((model(ids).logits - want).square().mean()) for model in (chosen, nearest)]
    assert errors[0] < errors[1]


def test_a_text_that_is_too_short(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("To be")
    options = QuantizationOptions("int4", block_size=16, method="gptq", calibration_file=tmp_path / "text")
    with pytest.raises(ExportError, match="calibrating needs 256"):
        export_model(ExportOptions(str(checkpoint("llama")), tmp_path / "p", quantize=options))
