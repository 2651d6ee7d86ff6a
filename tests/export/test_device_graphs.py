"""Passes for graphs that run on a device: packed products, straight heads, and a step that feeds the next one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from llmx.export.feedback import candidates_graph
from llmx.runtime.manifest import load_manifest


def operators(folder: Path, graph: str) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(folder / f"{graph}.onnx").graph)


def test_a_layer_is_nine_nodes(device_package: Callable[[str], Path]) -> None:
    folder = device_package("llama")
    layers = load_manifest(folder).model.num_layers
    tail = Counter(["ArgMax", "Unsqueeze", "GatherElements", "Clip", "Reshape", "Cast", "Add"])
    want = {
        "FusedMatMul": 5 * layers + 1,  # packed query, key and value; output; gate, up and down
        "SkipSimplifiedLayerNormalization": 2 * layers,
        "GroupQueryAttention": layers,
        "QuickGelu": layers,
        "Mul": layers,
        "Gather": 1,
        "SimplifiedLayerNormalization": 1,
    }
    assert operators(folder, "decode") == Counter(want) + tail
    assert operators(folder, "prefill")["GatherND"] == 1


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2"])
def test_other_layers_are_verified_too(name: str, device_package: Callable[[str], Path]) -> None:
    """Biases (qwen2), norms between the product and the node (qwen3), soft caps and windows: exact while exporting."""
    folder = device_package(name)
    manifest = load_manifest(folder)
    assert manifest.verification.status == "passed"
    packed = [weight for weight in manifest.weights if "+" in weight.name]
    assert bool(packed) == (name != "qwen3")
    roles = {info.role for info in manifest.graphs["decode"].outputs}
    assert {"next_input_ids", "greedy_logits", "next_seqlens_k"} <= roles


@pytest.mark.parametrize("vocab", [40, 1000])
def test_candidates_are_the_top_of_each_row(vocab: int, tmp_path: Path) -> None:
    import onnxruntime

    ir.save(candidates_graph(vocab, ir.DataType.FLOAT), tmp_path / "candidates.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "candidates.onnx", providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((5, 1, vocab)) * 4).astype(np.float32)
    temperature = np.array([0.3, 1.0, 2.0, 1e-30, 50.0], np.float32)
    top, ids, log_sum = session.run(None, {"logits": logits, "temperature": temperature})
    order = np.argsort(-logits[:, 0], axis=1, kind="stable")[:, :64]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(top, np.take_along_axis(logits[:, 0], order, 1))
    scaled = (logits[:, 0].astype(np.float64) - logits[:, 0].max(1, keepdims=True)) / temperature[:, None]
    np.testing.assert_allclose(log_sum, np.log(np.exp(scaled).sum(1)), atol=1e-5)
