"""Prompts by integer products: near the quantized weights, row by row, and only where they were asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from llmx.cli.main import main
from llmx.export import ExportOptions, dequantized, export_model, integer_check, integer_products
from llmx.export.blocks import Scheme, round_to_nearest
from llmx.export.checkpoint import open_checkpoint
from llmx.export.integer_products import IntegerProducts, integer_form
from llmx.export.quantization import QuantizationOptions, QuantizedWeight, plan_quantization, second_form
from llmx.export.quantized_graph import KEY
from llmx.export.weights import build_source
from llmx.runtime import LLM, SamplingParams, Speculation
from llmx.runtime.errors import ExportError, PackageError, VerificationError
from llmx.runtime.manifest import load_manifest
from transformers import AutoModelForCausalLM

Get = Callable[[str], Path]


def quantized(name: str, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """A random matrix in 4 bits, its rows in two pieces."""
    values = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))
    pieces = [round_to_nearest(part, Scheme(4, 16, True), torch.float32) for part in values.split(rows // 2 + 1)]
    return QuantizedWeight(name, Scheme(4, 16, True), (rows, columns), torch.float32, lambda: iter(pieces))


def value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def graph_of(weights: list[QuantizedWeight], bias: np.ndarray | None = None) -> ir.Model:
    """x @ [weights below each other]^T (+ bias), taken apart into the weights' own products where there are several."""
    columns, rows = weights[0].shape[1], sum(w.shape[0] for w in weights)
    x, y = value("x", ["batch", "seq", columns]), value("y", ["batch", "seq", rows])
    inits = [value("m.codes", [rows, -(-columns // 16), 8], ir.DataType.UINT8), value("m.scales", [rows, 1])]
    inits[0].metadata_props[KEY] = "\n".join(w.codes for w in weights)
    inputs: list[ir.Value | None] = [x, *inits]
    if bias is not None:
        tensor = ir.tensor(bias, name="bias")
        inputs += [None, None, ir.Value(name="bias", const_value=tensor, shape=tensor.shape, type=y.type)]
    node = ir.node("MatMulNBits", inputs, {"K": columns, "N": rows}, domain="com.microsoft", outputs=[y])
    nodes, outputs = [node], [y]
    if len(weights) > 1:
        outputs = [value(f"y{i}", ["batch", "seq", w.shape[0]]) for i, w in enumerate(weights)]
        nodes.append(ir.node("Split", [y], {"axis": -1, "num_outputs": len(weights)}, outputs=outputs))
    graph = ir.Graph([x], outputs, nodes=nodes, opset_imports={"": 21, "com.microsoft": 1}, name="g")
    for init in [*inits, *(v for v in inputs[5:] if v is not None)]:
        graph.initializers[init.name or ""] = init
    model = ir.Model(graph, ir_version=10)
    assert IntegerProducts({w.name: w for w in weights}, KEY)(model).modified
    assert not IntegerProducts({}, KEY)(model).modified
    return model


def session(model: ir.Model) -> Any:
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, providers=["CPUExecutionProvider"])


def dense(weight: QuantizedWeight) -> np.ndarray:
    return torch.cat([blocks.dequantized() for blocks in weight.blocks()]).double().numpy()


def activations(rows: int, columns: int) -> np.ndarray:
    """[1, rows, columns] of very different sizes: an outlier in one row, zeros in another, tiny and large ones."""
    x = np.random.default_rng(1).standard_normal((1, rows, columns)).astype(np.float32)
    x[0, 1] = 0
    x[0, 2, 5] = 300
    x[0, 3:4] *= 1e-30
    x[0, 4:5] *= 1e20
    return x


def test_integer_form_is_nearest_for_each_output() -> None:
    weight = quantized("w", 33, 40)
    codes, scales = integer_form(weight)
    want = dense(weight)
    assert codes.shape == (40, 33) and int(codes.abs().max()) == 127
    error = np.abs(codes.double().numpy().T * scales.double().numpy()[:, None] - want)
    assert (error <= scales.double().numpy()[:, None] * 0.5001).all()


@pytest.mark.parametrize(("count", "biased"), [(1, False), (2, False), (1, True)])
def test_products(count: int, biased: bool) -> None:
    weights = [quantized(f"w{i}", 24, 80, i) for i in range(count)]
    bias = np.linspace(-3, 3, 24).astype(np.float32) if biased else None
    model = graph_of(weights, bias)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("MatMulIntegerToFloat") == 2 * count and "Split" not in kinds and "MatMulNBits" not in kinds
    assert kinds.count("ReduceMax") == 1  # the digits are made once
    x = activations(9, 80)
    for weight, got in zip(weights, session(model).run(None, {"x": x}), strict=True):
        codes, scales = integer_form(weight)
        want = x.astype(np.float64) @ (codes.double() * scales.double()).numpy()
        # half a step of the low digit for each value
        step = np.abs(x).astype(np.float64).max(-1, keepdims=True) / 63 / 126 / 2
        allowed = step * np.abs((codes.double() * scales.double()).numpy()).sum(0) + 1e-6 * np.abs(want).max(
            -1, keepdims=True
        )
        extra = 0 if bias is None else bias
        assert (np.abs(got - (want + extra)) <= allowed + 1e-6 * np.abs(extra)).all()
        assert bias is not None or not got[0, 1].any()


def test_no_row_depends_on_another() -> None:
    run = session(graph_of([quantized("w", 40, 80)])).run
    x = activations(37, 80)
    [whole] = run(None, {"x": x})
    for rows in ([0], [36], [3, 4, 9], list(range(16)), list(range(5, 37))):
        np.testing.assert_array_equal(run(None, {"x": x[:, rows]})[0], whole[:, rows])
    np.testing.assert_array_equal(run(None, {"x": x[0, :36].reshape(4, 9, 80)})[0].reshape(36, -1), whole[0, :36])


def test_digits_fit_in_seven_bits() -> None:
    """Two products of a digit and a weight add up within 16 bits, where CPUs without VNNI add them."""
    model = graph_of([quantized("w", 24, 80)])
    digits = [node.inputs[0] for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
    for digit in digits:
        assert digit is not None
        digit.type, digit.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape(["batch", "seq", 80])
        model.graph.outputs.append(digit)
    x = np.concatenate([activations(9, 80), np.linspace(-1, 1, 80 * 9, dtype=np.float32).reshape(1, 9, 80)], axis=1)
    x[0, 1, 0] = 1  # a row of zeros has any digits
    for got in session(model).run(None, {"x": x})[1:]:
        assert got.dtype == np.uint8 and got.min() >= 1 and got.max() <= 127


def test_an_infinite_row_and_a_missing_one_stay_visible() -> None:
    run = session(graph_of([quantized("w", 24, 80)])).run
    x = activations(3, 80)
    x[0, 0, 7], x[0, 2] = np.inf, np.nan
    [got] = run(None, {"x": x})
    assert not np.isfinite(got[0, [0, 2]]).any() and np.isfinite(got[0, 1]).all()


def test_who_gets_a_second_form(checkpoint: Get) -> None:
    source = build_source(open_checkpoint(str(checkpoint("llama")), None, False, "auto"), torch.float32, None, None)
    plan = plan_quantization(source, QuantizationOptions("int4", block_size=16))
    layers = {name for name in plan if "layers" in name}
    assert len(layers) == 3 * 7 < len(plan)
    assert [set(second_form(plan, how, source)) for how in ("auto", "int8", "same")] == [layers, layers, set()]
    with pytest.raises(ExportError, match="auto, int8 or same"):
        second_form(plan, "int4", source)
    first = next(iter(layers))
    plan[first] = replace(plan[first], shape=(1 << 16, 1 << 15))
    assert not second_form(plan, "auto", source)  # of two gigabytes and more: on request alone
    assert set(second_form(plan, "int8", source)) == layers


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, checkpoint: Get) -> Path:
    folder = tmp_path_factory.mktemp("integers") / "package"
    options = QuantizationOptions("int4", block_size=16)
    export_model(ExportOptions(str(checkpoint("qwen2")), folder, quantize=options))  # with biases
    return folder


def test_few_tokens_and_guesses_go_another_way(package: Path) -> None:
    """Chunks of a prompt are alike to the last bit wherever they are cut; few tokens are computed as steps are."""
    manifest = load_manifest(package)
    assert set(manifest.graphs) == {"prefill", "decode", "append"}
    ids = np.random.default_rng(3).integers(1, 300, 60)
    with LLM(package, slots=2) as llm:
        backend, rows = llm.backend, []
        for cuts in ((60,), (20, 60), (13, 41, 60)):
            start, logits = 0, np.zeros(0)
            for end in cuts:
                logits = backend.prefill(0, ids[start:end], start, np.array([end - start - 1]))
                start = end
            rows.append(logits[0].copy())
        np.testing.assert_array_equal(rows[0], rows[1])
        np.testing.assert_array_equal(rows[0], rows[2])
        assert "append" not in list(llm.backend._sessions)  # type: ignore[attr-defined]
        each = backend.prefill(0, ids[:8], 60, np.arange(8)).copy()
        assert "append" in list(llm.backend._sessions)  # type: ignore[attr-defined]
        backend.copy_slot(0, 1, 60)
        judged = backend.verify(np.stack([ids[:8], ids[:8]]), np.array([60, 60]), np.array([8, 8]))
        np.testing.assert_array_equal(judged[1], each)


def test_guesses_are_judged_as_steps_at_any_number(package: Path) -> None:
    ids = np.random.default_rng(3).integers(1, 300, 60)
    with LLM(package, slots=2) as llm:
        backend = llm.backend
        for slot in (0, 1):
            backend.prefill(slot, ids[:30], 0, np.zeros(0, np.int64))
        judged = backend.verify(np.stack([ids[30:50]] * 2), np.array([30, 30]), np.array([20, 20]))[0].copy()
        each = backend.prefill_each(0, ids[30:50], 30).rows().copy()
        steps = np.stack([backend.decode(ids[i : i + 1], np.array([i])).row(0).copy() for i in range(30, 50)])
    for got in (judged, each):  # a last bit may turn one int8 activation; other products turn up in every number
        assert np.median(np.abs(got - steps)) < 1e-5 * np.abs(steps).max()


def test_a_package_replaced_while_it_is_open(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    shutil.copytree(package, folder)
    with LLM(folder, slots=1) as llm:
        llm.backend.prefill(0, np.arange(1, 30), 0, np.array([28]))
        (folder / "weights.data").write_bytes((folder / "weights.data").read_bytes())
        with pytest.raises(PackageError, match="replaced or removed while it was open; load it again"):
            llm.backend.prefill(0, np.arange(1, 5), 29, np.array([3]))
        llm.backend.prefill(0, np.arange(1, 30), 0, np.array([28]))  # others go on


def test_speculation_beside_plain_decoding(package: Path) -> None:
    """Guesses are judged by the products that decoding has."""
    prompt = np.random.default_rng(4).integers(1, 300, 12).tolist() * 3
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    texts = []
    for speculative in (None, Speculation(prompt_lookup=True)):
        with LLM(package, slots=1, speculative=speculative) as llm:
            texts.append(llm.generate([prompt], params)[0].outputs[0].token_ids)
    assert texts[0] == texts[1]


def test_a_wrong_form_is_caught(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = integer_products.integer_form

    def wrong(weight: QuantizedWeight) -> Any:
        codes, scales = right(weight)
        return codes.flip(0), scales

    monkeypatch.setattr(integer_products, "integer_form", wrong)
    with pytest.raises(VerificationError, match="The int8 form of .* is not the matrix: they lie 1"):
        export_model(
            ExportOptions(str(checkpoint("llama")), tmp_path / "p", quantize=QuantizationOptions("int4", block_size=16))
        )
    assert not (tmp_path / "p").exists()


def swapped(made: Any, row: Any, weight: QuantizedWeight) -> ir.Value:
    return PRODUCT(made, integer_products._Row(row.low, row.high, row.scale), weight)


PRODUCT = IntegerProducts._product


def test_a_wrong_graph_is_caught(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right matrices in a wrong graph: the digits change places. At export, and by `verify` where a check was lacking then."""
    monkeypatch.setattr(IntegerProducts, "_product", staticmethod(swapped))
    quantize = QuantizationOptions("int4", block_size=16)
    options = ExportOptions(str(checkpoint("llama")), tmp_path / "p", quantize=quantize)
    with pytest.raises(VerificationError, match="Prompts by integer products and PyTorch .* disagree"):
        export_model(options)
    assert not (tmp_path / "p").exists()
    export_model(replace(options, verify=False))
    arguments = [
        "verify",
        "--onnx",
        str(tmp_path / "p"),
        "--model",
        str(checkpoint("llama")),
        "--prompts",
        "1",
        "--json",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "Prompts by integer products" in json.loads(result.stdout)["reason"]


def test_verify_checks_the_form(package: Path, checkpoint: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    right = integer_check.array_of

    def wrong(found: ir.Value | None) -> np.ndarray | None:
        array = right(found)
        return array[::-1] if array is not None and array.dtype == np.int8 else array

    arguments = ["verify", "--onnx", str(package), "--model", str(checkpoint("qwen2")), "--prompts", "1", "--json"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    monkeypatch.setattr(integer_check, "array_of", wrong)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "int8 form" in json.loads(result.stdout)["reason"]


def test_prompts_are_pytorch_with_the_integer_form(package: Path, checkpoint: Get) -> None:
    """The two digits of an activation are all that is rounded on the way to a prompt's logits, but for the head's products."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"), dtype=torch.float32)
    matrices = dequantized.quantized_matrices(package, load_manifest(package))
    dequantized.use_package_weights(model, matrices)
    parameters, replaced = dict(model.named_parameters()), 0
    for node in ir.load(package / "prefill.onnx").graph:
        if node.op_type != "MatMulIntegerToFloat":
            continue
        codes, scales = node.inputs[1], node.inputs[3]
        assert codes is not None and scales is not None and codes.const_value is not None and scales.const_value
        rows = torch.from_numpy((codes.const_value.numpy() * scales.const_value.numpy()).T.copy())
        for name in (codes.name or "").removesuffix(".int8").split("+"):
            target = parameters[name].data
            target.copy_(rows[: len(target)])
            rows, replaced = rows[len(target) :], replaced + 1
    assert replaced == 2 * 3 * 7  # each matrix of three layers, by both products
    ids = np.random.default_rng(3).integers(1, 300, 60)
    asked = np.array([59])
    with torch.no_grad():
        hidden = model.model(torch.from_numpy(ids)[None])[0][0, asked]
        want = model.lm_head(hidden).numpy()
    with LLM(package, slots=1) as llm:
        got = llm.backend.prefill(0, ids, 0, asked)
    assert np.abs(got - want).max() < 0.01 * np.abs(want).max()


def test_on_request(checkpoint: Get, tmp_path: Path) -> None:
    arguments = ["export", "--model", str(checkpoint("llama")), "--output", str(tmp_path / "p"), "--no-verify"]
    given = ["--quantize", "int4", "--quantize-block-size", "16", "--quantize-prompts", "same"]
    result = CliRunner().invoke(main, [*arguments, *given])
    assert result.exit_code == 0, result.output
    manifest = load_manifest(tmp_path / "p")
    assert set(manifest.graphs) == {"prefill", "decode"} and (manifest.quantization or {})["prompts"] == "same"
    result = CliRunner().invoke(main, [*arguments, "--quantize-prompts", "int8", "--force"])
    assert result.exit_code == 0 and "--quantize-prompts int8 changes nothing here" in result.output
