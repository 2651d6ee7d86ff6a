"""Carried state: dtypes of 16-bit packages, what is refused, which prompts a package takes whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from llmx.export import ExportOptions, export_model
from llmx.runtime import LLM, SamplingParams, load_manifest
from llmx.runtime.errors import VerificationError


@pytest.mark.parametrize(("name", "dtypes"), [("mamba", {"float16", "float32"}), ("bloom", {"float16"})])
def test_float16(name: str, dtypes: set[str], checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A recurrence stays in float32, as PyTorch keeps it; verification runs both graphs."""
    result = export_model(ExportOptions(str(checkpoint(name)), tmp_path / "package", dtype="fp16"))
    assert result.manifest.verification.status == "passed"
    assert {tensor.dtype for tensor in result.manifest.state} == dtypes
    with LLM(result.path) as llm:
        [out] = llm.generate([[5] * 20], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert len(out.outputs[0].token_ids) == 4


def test_a_loop_over_the_prompt_is_not_traced(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Its trace would be right for prompts of the example's length alone; the user hears of it."""
    result = export_model(ExportOptions(str(checkpoint("mamba")), tmp_path / "package"))
    assert set(result.manifest.graphs) == {"decode"}
    assert any("token by token" in warning for warning in result.warnings)


def test_nothing_limits_a_recurrence(package: Callable[[str], Path]) -> None:
    assert load_manifest(package("mamba")).model.context_length == 1 << 20
    assert load_manifest(package("bloom")).model.context_length == 1 << 20
    assert load_manifest(package("lfm2")).model.context_length == 512


def test_a_model_whose_steps_say_something_else_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt cannot be traced as a whole, so a package would say what the steps say."""
    from transformers.models.mamba import modeling_mamba

    update = modeling_mamba.mamba_selective_state_update
    monkeypatch.setattr(modeling_mamba, "mamba_selective_state_update", lambda *a, **k: update(*a, **k) * 1.002)
    with pytest.raises(VerificationError, match="PyTorch disagrees with itself"):
        export_model(ExportOptions(str(checkpoint("mamba")), tmp_path / "package"))
    assert not (tmp_path / "package").exists()


def test_prompts_too_short_for_the_prefill_graph_are_compared(
    checkpoint: Callable[[str], Path],
    package: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They go through the decode graph from the state before the first token, which nothing else reads."""
    from llmx.runtime.carried import CarriedBackend

    assert load_manifest(package("mamba2")).model.min_prefill > 1
    empty = CarriedBackend._empty
    monkeypatch.setattr(
        CarriedBackend, "_empty", lambda backend: [type(v).ortvalue_from_numpy(v.numpy() + 1) for v in empty(backend)]
    )
    with pytest.raises(VerificationError, match="row 0, prefill position 0"):
        export_model(ExportOptions(str(checkpoint("mamba2")), tmp_path / "package"))
