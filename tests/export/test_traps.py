"""What other exporters get silently wrong (docs/design.md, section 4): a test for each trap, or the place of the one that
shows it already.

- Rotary scaling other than `llama3` ignored: test_grid.py (every scaling on three families), test_rope.py (around the
  length where factors change), and below.
- LayerNorm exported as RMSNorm: below; what is fused, test_export.py::test_fusions_change_what_they_should.
- Epsilon defaulted: below, and "epsilon" in test_grid.py.
- Sliding window lost when `layer_types` is absent: below, and "window without layer_types" in test_grid.py.
- Left-padded batches: llmx pads on the right and says how long rows are; test_parity.py::test_greedy_equals_transformers
  (a ragged batch equals each row alone), test_encoder.py for encoders, and below for what lies in the padding.
- Tied weights written twice: test_export.py::test_tied_weights_once_and_aligned; memory, tests/runtime/test_resources.py.
- The two-gigabyte limit of protobuf: below (slow: it takes a model of that size).
- A dimension of 0 or 1 at tracing specialised away: below.
- fp16 overflow: of weights, test_export.py::test_float16_overflow_is_refused; of activations, below.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from llmx.export import ExportOptions, export_model
from llmx.runtime import LLM, SamplingParams, load_manifest
from llmx.runtime.errors import VerificationError
from zoo.models import VOCAB, make_config, make_model, save_checkpoint, widen

PROMPT = np.random.default_rng(5).integers(1, VOCAB, 61)


def export_of(model: Any, work: Path, **options: Any) -> Path:
    """The package, written without the export's own comparison unless told."""
    save_checkpoint(model, work / "checkpoint")
    settings: dict[str, Any] = {"verify": False, **options}
    return export_model(ExportOptions(str(work / "checkpoint"), work / "package", **settings)).path


def logits_of(folder: Path) -> np.ndarray:
    with LLM(folder, slots=1, threads=1) as llm:
        return llm.backend.prefill(0, PROMPT, 0, np.arange(len(PROMPT))).copy()


def reference(model: Any) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(PROMPT)[None]).logits[0].numpy()
    return logits


def ignoring(model: Any, **fields: Any) -> np.ndarray:
    """The logits of the same weights under a config with other `fields`: what an exporter that falls for it would give."""
    other = type(model)(type(model.config)(**{**model.config.to_dict(), **fields})).eval()
    other.load_state_dict(model.state_dict())
    return reference(other)


def shows(model: Any, work: Path, **fields: Any) -> None:
    """The package agrees with `model`, and would not if `fields` had been lost."""
    want = reference(model)
    assert np.abs(ignoring(model, **fields) - want).max() > 1e-2
    np.testing.assert_allclose(logits_of(export_of(model, work)), want, atol=1e-4)


def test_a_rotary_scaling_is_not_ignored(package: Callable[[str], Path]) -> None:
    """Each of TINY's scalings, against what the default rotation would give."""
    for kind in ("linear", "yarn", "proportional", "longrope"):
        model = make_model(f"llama-{kind}")
        plain = ignoring(model, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
        want = reference(model)
        assert np.abs(plain - want).max() > 1e-2, kind
        np.testing.assert_allclose(logits_of(package(f"llama-{kind}")), want, atol=1e-4, err_msg=kind)


def test_a_layer_norm_is_no_rms_norm(package: Callable[[str], Path]) -> None:
    model = make_model("gpt_neox")
    want = reference(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):  # without subtracting the mean
                module.forward = lambda x, m=module: (
                    torch.nn.functional.rms_norm(x, m.normalized_shape, m.weight, m.eps) + m.bias
                )
    assert np.abs(reference(model) - want).max() > 1e-2
    np.testing.assert_allclose(logits_of(package("gpt_neox")), want, atol=1e-4)
    kinds = {node.op_type for node in ir.load(package("gpt_neox") / "prefill.onnx").graph}
    assert "LayerNormalization" in kinds and not {k for k in kinds if "Simplified" in k or "RMS" in k}


@pytest.mark.parametrize(("name", "field"), [("llama", "rms_norm_eps"), ("gpt_neox", "layer_norm_eps")])
def test_epsilon_is_the_models(name: str, field: str, tmp_path: Path) -> None:
    shows(make_model(name, num_hidden_layers=1, **{field: 0.3}), tmp_path, **{field: 1e-6})


def test_a_window_needs_no_layer_types(tmp_path: Path) -> None:
    model = make_model("mistral", num_hidden_layers=1)
    assert "layer_types" not in model.config.to_dict()
    shows(model, tmp_path, sliding_window=None)
    assert {tensor.window for tensor in load_manifest(tmp_path / "package").state} == {24}


def test_what_lies_in_the_padding_is_never_read(package: Callable[[str], Path]) -> None:
    """A shorter row beside a longer one, in a slot whose rest is full of another prompt's state."""
    with LLM(package("llama"), slots=2) as llm:
        backend = llm.backend
        short = PROMPT[:9]
        clean = backend.prefill(0, short, 0, np.array([8]))[0].copy()
        step = backend.decode(np.array([7]), np.array([9])).row(0).copy()
        backend.prefill(0, PROMPT[::-1].copy(), 0, np.array([60]))
        backend.prefill(1, PROMPT, 0, np.array([60]))
        np.testing.assert_array_equal(backend.prefill(0, short, 0, np.array([8]))[0], clean)
        both = backend.decode(np.array([7, 3]), np.array([9, 61]))
        np.testing.assert_allclose(both.row(0), step, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_sizes_of_zero_and_one(name: str, package: Callable[[str], Path]) -> None:
    """A prompt of one token, no position asked, one row of many, a state of one position."""
    want = reference(make_model(name))
    with LLM(package(name), slots=3) as llm:
        backend = llm.backend
        assert backend.prefill(0, PROMPT[:40], 0, np.array([], np.int64)).shape == (0, VOCAB)
        np.testing.assert_allclose(backend.prefill(1, PROMPT[:1], 0, np.array([0]))[0], want[0], atol=1e-4)
        active = np.array([False, True, False])
        rows = backend.decode(np.array([0, PROMPT[1], 0]), np.array([40, 1, 0]), active)
        np.testing.assert_allclose(rows.row(1), want[1], atol=1e-4)
        np.testing.assert_allclose(backend.decode(PROMPT[40:41], np.array([40])).row(0), want[40], atol=1e-4)


def test_fp16_activations_that_overflow_are_refused(tmp_path: Path) -> None:
    model = make_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3e4)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
    want = reference(model)
    assert np.isfinite(want).all()
    with pytest.raises(VerificationError, match=r"overflows float16.*--dtype bf16 or fp32"):
        export_of(model, tmp_path, dtype="fp16", verify=True)
    assert not (tmp_path / "package").exists()
    np.testing.assert_allclose(logits_of(export_of(model, tmp_path)), want, atol=1e-3)


@pytest.mark.slow
def test_weights_past_two_gigabytes(tmp_path: Path) -> None:
    """2.3 GB of weights: the graphs stay small, and the tokens are PyTorch's."""
    from transformers import AutoModelForCausalLM

    rows, width = 280_000, 2048
    config = make_config("llama-tied", vocab_size=rows, hidden_size=width, num_hidden_layers=1, intermediate_size=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    widen(model, 0)
    assert 4 * rows * width > 1 << 31
    with torch.no_grad():
        expected = model.generate(torch.from_numpy(PROMPT)[None], max_new_tokens=6, do_sample=False, eos_token_id=-1)
    folder = export_of(model, tmp_path)
    del model
    assert (folder / "weights.data").stat().st_size > 1 << 31
    assert all((folder / f"{name}.onnx").stat().st_size < 1 << 20 for name in ("prefill", "decode"))
    with LLM(folder, slots=1, max_length=128) as llm:
        [out] = llm.generate([PROMPT.tolist()], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))
    assert out.outputs[0].token_ids == expected[0, len(PROMPT) :].tolist()
