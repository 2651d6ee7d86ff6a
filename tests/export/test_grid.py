"""The hyper-parameter grid: every logit of ragged prompts and of the tokens after them, beside PyTorch's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from llmx.export import ExportOptions, export_model
from llmx.export.package import hash_files, write_manifest
from llmx.export.rope import length_rule
from llmx.export.verify import TOLERANCE, reference_path
from llmx.runtime import LLM, load_manifest
from llmx.runtime.backend import recompute
from llmx.runtime.manifest import MANIFEST_FILE
from transformers import AutoModelForCausalLM
from zoo.grid import CI, CI_16, GRID, experts_alike, make_grid_model
from zoo.models import save_checkpoint

#: Largest difference of logits: absolute in fp32, in 16 bits a part of the largest logit. In bf16 the graph's arithmetic is
#: float32 and what differs are scalars of the model's code, which ONNX wants in bfloat16, too: half a unit each, two allowed.
FP32, FP16, BF16 = 1e-4, 1e-2, 2**-8
#: With every operator's result rounded to bfloat16: how often PyTorch's own error in bfloat16 ours may be, and the tolerance
#: that llmx states for such packages, a part of the largest logit.
OWN, ROUNDED = 2.0, TOLERANCE["bfloat16"]
LENGTHS = (7, 61, 23)
NEW_TOKENS = 12


def _slow_but(names: list[str]) -> list[Any]:
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in GRID]


CASES, CASES_16 = _slow_but(CI), _slow_but(CI_16)


def export_of(model: Any, work: Path, dtype: str) -> Path:
    """The package, written without the export's own comparison."""
    checkpoint = save_checkpoint(model, work / "checkpoint")
    return export_model(ExportOptions(str(checkpoint), work / "package", dtype=dtype, verify=False)).path


def largest_difference(folder: Path, model: Any) -> tuple[float, float]:
    """(largest difference, largest logit) over prompts prefilled in chunks and decoded in one batch on PyTorch's tokens."""
    stepwise = length_rule(model) is not None
    paths = [reference_path(model, n, seed, NEW_TOKENS, stepwise) for seed, n in enumerate(LENGTHS)]
    worst = 0.0
    with LLM(folder, slots=len(paths), threads=1) as llm:
        backend = llm.backend
        for row, path in enumerate(paths):
            chunk = 9 if backend.chunked else path.prompt_length
            for start in range(0, path.prompt_length, chunk):
                tokens = path.tokens[start : min(start + chunk, path.prompt_length)]
                got = backend.prefill(row, tokens, start, np.arange(len(tokens)), path.rope_length)
                worst = max(worst, float(np.abs(got - path.logits[start : start + len(tokens)]).max()))
        for step in range(NEW_TOKENS):
            at = np.array([path.prompt_length + step for path in paths])
            for row, path in enumerate(paths):
                if at[row] == backend.recompute_at:
                    recompute(backend, row, path.tokens[: at[row]], 9)
            got = backend.decode(np.array([p.tokens[n] for p, n in zip(paths, at, strict=True)]), at).rows()
            want = np.array([p.logits[n] for p, n in zip(paths, at, strict=True)])
            worst = max(worst, float(np.abs(got - want).max()))
    return worst, max(float(np.abs(path.logits).max()) for path in paths)


@pytest.mark.parametrize("name", CASES)
def test_fp32(name: str, tmp_path: Path) -> None:
    model = make_grid_model(name)
    worst, _ = largest_difference(export_of(model, tmp_path, "fp32"), model)
    assert worst <= FP32


def loaded(work: Path, dtype: torch.dtype) -> Any:
    """PyTorch's model as transformers loads it in `dtype`: its weights rounded, what it computes (frequencies) in float32."""
    return AutoModelForCausalLM.from_pretrained(work / "checkpoint", dtype=dtype).eval()


@pytest.mark.parametrize("name", CASES_16)
def test_fp16(name: str, tmp_path: Path) -> None:
    """Against PyTorch in float32 on the same rounded weights."""
    folder = export_of(make_grid_model(name), tmp_path, "fp16")
    worst, scale = largest_difference(folder, loaded(tmp_path, torch.float16).float())
    assert worst <= FP16 * max(1.0, scale)


@pytest.mark.parametrize("name", CASES_16)
def test_bf16(name: str, tmp_path: Path) -> None:
    """The CPU provider has bfloat16 kernels for few operators. The graph with its rounded weights and constants is compared,
    computed in float32, and again with what each operator returns rounded to bfloat16, as its kernel would round it: it may
    be as far from float32 as PyTorch in bfloat16 is, times `OWN`.
    """
    model = make_grid_model(name)
    folder = in_float32(export_of(model, tmp_path, "bf16"))
    worst, scale = largest_difference(folder, loaded(tmp_path, torch.bfloat16).float())
    assert worst <= BF16 * max(1.0, scale)
    if experts_alike(model):  # which of two like scores is higher, is noise in bfloat16, in PyTorch as well
        tmp_path = tmp_path / "alike"
        folder = in_float32(export_of(model, tmp_path, "bf16"))
    reference = loaded(tmp_path, torch.bfloat16).float()
    rounded, scale = largest_difference(with_rounded_results(folder), reference)
    own = own_error(loaded(tmp_path, torch.bfloat16), reference)
    assert worst < rounded <= min(OWN * own, ROUNDED * max(1.0, scale))


def own_error(model: Any, reference: Any) -> float:
    """How far PyTorch's `model` in 16 bits is from itself in float32, on the tokens that packages are compared on."""
    worst = 0.0
    for seed, length in enumerate(LENGTHS):
        path = reference_path(reference, length, seed, NEW_TOKENS, stepwise=True)
        with torch.no_grad():
            got, want = (each(input_ids=torch.from_numpy(path.tokens)[None]).logits for each in (model, reference))
        worst = max(worst, float((got.float() - want).abs().max()))
    return worst


def with_rounded_results(folder: Path) -> Path:
    """The package of `in_float32` with casts to bfloat16 and back after every result that was in bfloat16, the logits apart, in
    place: what the graph computes in float32 (angles of rotary embeddings) stays so.
    """
    manifest = load_manifest(folder)
    for graph in manifest.graphs.values():
        model = ir.load(folder / graph.file)
        outputs = set(model.graph.outputs)
        for node in list(model.graph):
            for value in node.outputs:
                if value.name not in node.metadata_props or value in outputs or not value.uses():
                    continue
                down = ir.node("Cast", [value], {"to": int(ir.DataType.BFLOAT16)})
                up = ir.node("Cast", [down.outputs[0]], {"to": int(ir.DataType.FLOAT)})
                for user, index in list(value.uses()):
                    if user is not down:
                        user.replace_input_with(index, up.outputs[0])
                model.graph.insert_after(node, [down, up])
        ir.save(model, folder / graph.file)
    write_manifest(folder, replace(manifest, files=hash_files(folder, {})))
    return folder


def in_float32(folder: Path) -> Path:
    """The bfloat16 package with every bfloat16 tensor, cast and state in float32, in place."""
    manifest = load_manifest(folder)
    for graph in manifest.graphs.values():
        model = ir.load(folder / graph.file)
        for value in [*model.graph.initializers.values()]:
            tensor = value.const_value
            assert tensor is not None
            wide = tensor.numpy().astype(np.float32) if tensor.dtype == ir.DataType.BFLOAT16 else tensor.numpy()
            value.const_value = ir.tensor(wide, name=value.name)
            value.type = ir.TensorType(value.const_value.dtype)
        for node in model.graph:
            kept = {v.name: "bfloat16" for v in node.outputs if v.dtype == ir.DataType.BFLOAT16 and v.name}
            node.metadata_props.update(kept)
        for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
            if value.dtype == ir.DataType.BFLOAT16:
                value.type = ir.TensorType(ir.DataType.FLOAT)
        for node in model.graph:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.BFLOAT16:
                    wide = attribute.as_tensor().numpy().astype(np.float32)
                    node.attributes[name] = ir.AttrTensor(name, ir.tensor(wide))
        ir.save(model, folder / graph.file)
    wide_json = manifest.to_json().replace('"bfloat16"', '"float32"')
    (folder / MANIFEST_FILE).write_text(wide_json)
    write_manifest(folder, replace(load_manifest(folder, check_sizes=False), files=hash_files(folder, {})))
    return folder
