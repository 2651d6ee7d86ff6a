"""`llmx export --quantize`: what is quantized, that graphs equal PyTorch on the quantized weights, that errors are caught."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from llmx.cli import main
from llmx.export import ExportOptions, blocks, export_model, quantized_graph
from llmx.export.dequantized import quantized_matrices, use_package_weights
from llmx.export.quantization import QuantizationOptions
from llmx.runtime import LLM, SamplingParams, load_manifest, mapped_cache
from llmx.runtime.errors import ExportError, VerificationError
from zoo.models import make_model, make_seq2seq, save_checkpoint

Get = Callable[[str], Path]


def export(checkpoint: Path, output: Path, verify: bool = True, **options: Any) -> Any:
    quantize = QuantizationOptions(**{"weights": "int4", "block_size": 16, **options})
    return export_model(ExportOptions(str(checkpoint), output, verify=verify, quantize=quantize)).manifest


def operators(package: Path, graph: str = "decode") -> Counter[str]:
    return Counter(node.op_type for node in ir.load(package / f"{graph}.onnx").graph)


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory, checkpoint: Get) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "llama-tied"
    export(checkpoint("llama-tied"), folder)
    return folder


def test_manifest_and_graphs(int4: Path) -> None:
    manifest = load_manifest(int4)
    assert manifest.verification.status == "passed"
    assert manifest.verification.max_abs_diff <= manifest.verification.tolerance < 0.01
    facts = manifest.quantization
    assert facts is not None
    assert (facts["bits"], facts["head_bits"], facts["block_size"], facts["symmetric"]) == (4, 8, 16, True)
    assert facts["matrices"] == 3 * 7 + 1 and facts["method"] == "round-to-nearest"
    quality = facts["quality"]
    assert quality["text"] == "written by the model" and quality["positions"] == 4 * 64
    assert 0 < quality["compute_kl"] < quality["mean_kl"] < quality["max_kl"]
    assert 0 < quality["argmax_agreement"] <= 1
    assert quality["perplexity"] != quality["source_perplexity"] > 1
    for graph in ("append", "decode"):
        found = operators(int4, graph)
        # query, key and value are one product, gate and up another
        assert found["MatMulNBits"] == 3 * 4 + 1 and found["GatherBlockQuantized"] == 1
        assert not {"MatMul", "FusedMatMul", "Gather"} & found.keys()
    # the tied matrix is stored once; every other has codes, scales and a byte a value for prompts
    second = facts["parameters"] - manifest.model.vocab_size * manifest.model.hidden_size
    assert facts["prompts"] == "int8" and 0 < quality["prompts"]["compute_kl"] < quality["prompts"]["mean_kl"]
    assert second < manifest.files["weights.data"].size < facts["bytes"] + second + 120 * 4096


def test_graphs_share_weights_and_the_tied_table_its_codes(int4: Path) -> None:
    spans = []
    for graph in ("append", "decode"):
        tensors = [v.const_value for v in ir.load(int4 / f"{graph}.onnx").graph.initializers.values()]
        external = [t for t in tensors if isinstance(t, ir.ExternalTensor)]
        spans.append({(t.offset, t.length) for t in external})
        assert len(spans[-1]) == len(external) - 1  # the table and the head are one range
    assert spans[0] == spans[1]


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mamba", pytest.param("t5", marks=pytest.mark.slow)])
def test_families(name: str, checkpoint: Get, tmp_path: Path) -> None:
    """Conv1D with biases; an untied head; carried state; an encoder-decoder. Each verified while exporting."""
    source = save_checkpoint(make_seq2seq("t5"), tmp_path / "t5") if name == "t5" else checkpoint(name)
    manifest = export(source, tmp_path / "package", symmetric=False, weights="int8" if name == "qwen3" else "int4")
    assert manifest.verification.status == "passed"
    graph = operators(tmp_path / "package")
    assert manifest.quantization["matrices"] >= graph["MatMulNBits"] > 3
    if name == "gpt2":  # biases went into the products
        assert graph["MatMulNBits"] == 3 * 4 + 1 and graph["Gather"] == 1  # the table of positions stays
        assert not {"MatMul", "Gemm", "FusedMatMul"} & graph.keys()
    if name == "qwen3":
        assert manifest.quantization["bits"] == 8 and manifest.quantization["quality"]["mean_kl"] < 1e-3


def test_package_computes_with_its_weights(int4: Path) -> None:
    """Greedy tokens of the runtime are PyTorch's on the package's weights, but for what int8 activations change."""
    model = make_model("llama-tied")
    use_package_weights(model, quantized_matrices(int4, load_manifest(int4)))
    prompt = np.random.default_rng(5).integers(1, 300, 40)
    with torch.no_grad():
        want = model(torch.from_numpy(prompt)[None]).logits[0].numpy()
    with LLM(int4, slots=1) as llm:
        # few tokens at a time: longer prompts have another form of the weights (test_integer_products)
        got = np.stack([llm.backend.prefill(0, prompt[i : i + 1], i, np.arange(1))[0].copy() for i in range(40)])
        assert len(llm.generate("abc", SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids) == 5
    difference = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-5 < difference < 0.05


def test_mapped_cache(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_cache, "MIN_WEIGHTS", 0)
    prompt = np.arange(1, 30)
    logits = []
    for options in ({"mapped_cache": False}, {"cache_dir": tmp_path}, {"cache_dir": tmp_path}):
        with LLM(int4, slots=2, **options) as llm:
            llm.backend.prefill(0, prompt, 0, np.zeros(0, np.int64))
            logits.append(llm.backend.decode(np.array([3]), np.array([29])).rows().copy())
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])
    [entry] = [path for path in (tmp_path / "prepacked").iterdir() if path.is_dir()]
    # prompts have other weights; those of few tokens and of a step are one file
    assert sorted(str(path.relative_to(entry)) for path in entry.rglob("*.*")) == [
        "decode/append.onnx", "decode/decode.onnx", "decode/weights.bin", "prefill.onnx", "weights.bin",
    ]  # fmt: skip


def test_head_none_and_exclude(checkpoint: Get, tmp_path: Path) -> None:
    manifest = export(checkpoint("llama"), tmp_path / "p", False, head="none", exclude=("*.o_proj", "*layers.1.mlp.*"))
    graph = operators(tmp_path / "p")
    assert manifest.quantization["matrices"] == 3 * 7 - 3 - 3
    assert (
        graph["MatMulNBits"] == 3 + 1 + 3
    )  # a layer's query-key-value, gate-up and down; of the second, the first alone
    assert graph["FusedMatMul"] == 3 + 2 + 1 and graph["Gather"] == 1 and not graph["GatherBlockQuantized"]
    assert manifest.quantization["head_bits"] is None


def test_columns_that_fill_no_block(checkpoint: Get, tmp_path: Path) -> None:
    """48 columns in blocks of 32: products have padding, the embedding's lookup has none and stays as it is."""
    assert export(checkpoint("llama"), tmp_path / "p", block_size=32).verification.status == "passed"
    graph = operators(tmp_path / "p")
    assert graph["Gather"] == 1 and graph["MatMulNBits"] == 3 * 4 + 1
    with pytest.raises(ExportError, match="no matrix to quantize"):
        export(checkpoint("llama"), tmp_path / "q", block_size=128)


def test_a_wrong_layout_is_caught(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = blocks._packed
    monkeypatch.setattr(blocks, "_packed", lambda codes, bits: right(codes.flip(1), bits))
    with pytest.raises(VerificationError, match="is not its source rounded to"):
        export(checkpoint("llama"), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_wrong_graph_is_caught(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small errors, too: one bias of one layer lost."""
    right, lost = quantized_graph._bias, []

    def lose_one(product: ir.Value, rows: int) -> Any:
        add, bias = right(product, rows)
        if bias is None or lost:
            return add, bias
        lost.append(bias)
        return add, None

    monkeypatch.setattr(quantized_graph, "_bias", lose_one)
    with pytest.raises(VerificationError, match="ONNX and PyTorch disagree"):
        export(checkpoint("qwen2"), tmp_path / "p")
    assert lost


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_verify(int4: Path, checkpoint: Get, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("To be, or not to be, that is the question: " * 4)
    result = run("verify", "--onnx", int4, "--model", checkpoint("llama-tied"), "--text-file", text, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["passed"] and report["tolerance"] == 1e-4
    assert report["graph"]["max_abs_diff"] <= report["graph"]["allowed"] < report["outputs"]["max_abs_diff"]
    assert report["graph"]["positions_past_tolerance"] == 0 and report["outputs"]["mean_kl"] > 1e-4
    assert report["perplexity"]["onnx"] != report["perplexity"]["pytorch"]
    table = run("verify", "--onnx", int4, "--model", checkpoint("llama-tied"), "--prompts", 1)
    assert "PyTorch with its own weights" in table.stdout


def test_verify_of_another_model(int4: Path, tmp_path: Path) -> None:
    other = save_checkpoint(make_model("llama-tied", seed=1), tmp_path / "other")
    result = run("verify", "--onnx", int4, "--model", other, "--prompts", 1)
    assert result.exit_code == 1 and "is not its source rounded to" in result.stdout


def test_verify_of_an_altered_graph(int4: Path, checkpoint: Get, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(int4, package)
    for graph in ("prefill", "decode"):
        model = ir.load(package / f"{graph}.onnx")
        norm = next(n for n in model.graph if n.op_type == "SkipSimplifiedLayerNormalization")
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.01)
        ir.save(model, package / f"{graph}.onnx")
    from dataclasses import replace

    from llmx.export.package import hash_files, write_manifest

    manifest = load_manifest(package, check_sizes=False)
    write_manifest(package, replace(manifest, files=hash_files(package, {})))
    result = run("verify", "--onnx", package, "--model", checkpoint("llama-tied"), "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["passed"] and report["layer"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--quantize-head", "int4"], 2, "go with --quantize"),
        (["--quality-file", "x"], 2, "go with --quantize"),
        (["--quantize", "int4", "--quantize-block-size", "20"], 1, "16, 32, 64, 128 or 256"),
        (["--quantize", "int4", "--quality-file", "/nowhere"], 1, "cannot be read"),
        (["--quantize", "int2"], 2, "int2"),
    ],
)
def test_bad_options(arguments: list[str], code: int, message: str, checkpoint: Get, tmp_path: Path) -> None:
    result = run("export", "--model", checkpoint("llama"), "--output", tmp_path / "p", *arguments)
    assert result.exit_code == code and message in result.stderr and not (tmp_path / "p").exists()


def test_quality_on_a_given_text(demo_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "scene.txt"
    text.write_text("ROMEO:\nBut, soft! what light through yonder window breaks?\n" * 6)
    arguments = ["--model", demo_checkpoint, "--output", tmp_path / "p", "--quantize", "int4", "--quality-file", text]
    result = run("export", *arguments, "--json")
    quality = json.loads(result.stdout)["quantization"]["quality"]
    assert quality["text"] == "scene.txt" and quality["mean_kl"] < 0.1 and quality["argmax_agreement"] > 0.8
    assert abs(np.log(quality["perplexity"] / quality["source_perplexity"])) < 0.15
    shown = run("inspect", tmp_path / "p")
    assert "round-to-nearest" in shown.stdout and "scene.txt" in shown.stdout
