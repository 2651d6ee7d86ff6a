"""What a quantized package's graphs multiply with, as a reference for them.

A quantized package is checked in two steps. Its weights, read back from the package, must lie near the source's (a matrix
in another's place, turned over or packed in another order does not). PyTorch with those weights must then equal the graph
within the dtype's tolerance, where the graph computes without rounding activations to int8: `exact_copy`. What that
rounding costs is measured apart (`llmx.export.quality`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx_ir as ir
import torch
from llmx.export.blocks import Blocks, Scheme, unpacked
from llmx.export.experts import from_operator, to_operator
from llmx.export.quantized_graph import PREFIX
from llmx.export.values import take_name
from llmx.runtime.errors import VerificationError
from llmx.runtime.manifest import MANIFEST_FILE, FileInfo, Manifest

#: Largest distance of a quantized matrix from its source, as a part of the source's norm. Rounding 4-bit blocks costs 0.1,
#: a calibrated method twice that; a wrong matrix about 1.4.
_LARGEST_ERROR = {8: 0.05, 4: 0.4}
_ROWS = 1 << 22  # values unpacked at once
#: Codes, scales and zero points among a node's inputs.
_INPUTS = {"MatMulNBits": [(1, 2, 3)], "GatherBlockQuantized": [(0, 2, 3)], "QMoE": [(2, 3, 11), (5, 6, 12)]}


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [rows, columns] as a package's weights file holds it: arrays mapped from there, zero points as stored."""

    scheme: Scheme
    shape: tuple[int, int]
    codes: np.ndarray  # [rows, bytes]; scales and zero points alike
    scales: np.ndarray
    zero_points: np.ndarray | None

    def rows(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(offset from `first`, float32 [n, columns]) of `count` rows (None: all), a few after the other."""
        columns = self.shape[1]
        end = self.shape[0] if count is None else first + count
        step = max(1, _ROWS // columns)
        for start in range(first, end, step):
            part = slice(start, min(start + step, end))
            codes = unpacked(torch.from_numpy(self.codes[part].copy()), self.scheme.bits, columns)
            scales = torch.from_numpy(self.scales[part].astype(np.float32))
            zeros = None
            if self.zero_points is not None:
                packed = torch.from_numpy(self.zero_points[part].copy())
                zeros = unpacked(packed, self.scheme.bits, self.scheme.blocks(columns))
            yield start - first, Blocks(self.scheme, codes, scales, zeros).dequantized()


def quantized_matrices(folder: Path, manifest: Manifest) -> dict[str, StoredMatrix]:
    """Every matrix that a graph of the package reads quantized, by its parameter's name; by the names of all, joined by `+`,
    where it is several below each other.
    """
    found: dict[str, StoredMatrix] = {}
    for graph in manifest.graphs.values():
        for node in ir.load(folder / graph.file).graph:
            for places in _INPUTS.get(node.op_type, ()):
                codes, scales, zero_points = (node.inputs[i] if i < len(node.inputs) else None for i in places)
                assert codes is not None and codes.name is not None
                names = codes.name.rpartition(".")[0].split("+")
                name = "+".join(part.removeprefix(PREFIX) for part in names)
                found.setdefault(name, _stored(node, array_of(codes), array_of(scales), array_of(zero_points)))
    return found


def _stored(
    node: ir.Node, codes: np.ndarray | None, scales: np.ndarray | None, zeros: np.ndarray | None
) -> StoredMatrix:
    assert codes is not None and scales is not None
    bits = node.attributes["expert_weight_bits" if node.op_type == "QMoE" else "bits"].as_int()
    scheme = Scheme(bits, node.attributes["block_size"].as_int(), zeros is None)
    rows = int(np.prod(codes.shape[: 2 if node.op_type == "QMoE" else 1]))
    given = node.attributes.get("K")
    columns = given.as_int() if given is not None else codes.shape[-1] * 8 // bits
    flat = [array.reshape(rows, -1) if array is not None else None for array in (codes, scales, zeros)]
    assert flat[0] is not None and flat[1] is not None
    return StoredMatrix(scheme, (rows, columns), flat[0], flat[1], flat[2])


def array_of(value: ir.Value | None) -> np.ndarray | None:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def use_package_weights(model: Any, matrices: dict[str, StoredMatrix], check: bool = True) -> None:
    """Overwrite the float32 `model`'s matrices with what a package holds for them.

    Raises VerificationError where a matrix is not the model's, rounded (`check`).
    """
    for name, matrix, error in overwritten(model, matrices):
        bits = matrix.scheme.bits
        if check and not error <= _LARGEST_ERROR[bits]:
            raise VerificationError(
                f"The quantized {name} is not its source rounded to {bits} bits: they lie {error:.2g} of its norm apart "
                f"(at most {_LARGEST_ERROR[bits]:g} is rounding)."
            )


class Matrix(Protocol):
    """Something that stands for float32 [rows, columns], several parameters' below each other perhaps."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(offset from `first`, float32 [n, columns]) of `count` rows (None: all), a few after the other."""
        ...


M = TypeVar("M", bound=Matrix)


def overwritten(model: Any, matrices: Mapping[str, M]) -> Iterator[tuple[str, M, float]]:
    """Overwrite the float32 `model`'s parameters, one after another, with what `matrices` hold for them (by their names, joined by
    `+` where they lie below each other): each one's name and matrix, and how far the two lay apart, as a part of the old
    one's norm.

    Raises VerificationError where the numbers of rows differ.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = {
        f"{name}.{part}": module
        for name, module in model.named_modules()
        for part, _ in module.named_parameters(recurse=False)
    }
    for joined, matrix in matrices.items():
        names = joined.split("+")
        first = 0
        for name in names:
            yield name, matrix, _overwrite(owners[name], name.rpartition(".")[2], parameters[name].data, matrix, first)
            first += parameters[name].numel() // matrix.shape[1]
        if first != matrix.shape[0]:
            raise VerificationError(f"{joined} has {first} rows in PyTorch and {matrix.shape[0]} in the package.")


def _overwrite(owner: Any, part: str, target: torch.Tensor, matrix: Matrix, first: int) -> float:
    """Replace parameter `part` of module `owner` by the matrix' rows from `first` on; how far the two lay apart, as a part of
    the old one's norm.
    """
    from transformers.pytorch_utils import Conv1D

    if target.ndim == 3:
        whole = torch.cat([rows for _, rows in matrix.rows(first, target.numel() // matrix.shape[1])])
        in_operator = to_operator(owner, part, target)
        whole = from_operator(owner, part, whole.view(in_operator.shape))
        pieces = [(target, whole)]
    else:
        turned = target.T if isinstance(owner, Conv1D) else target
        if turned.shape[1] != matrix.shape[1]:
            return float("inf")
        pieces = ((turned[at : at + len(rows)], rows) for at, rows in matrix.rows(first, len(turned)))  # type: ignore[assignment]
    difference = norm = 0.0
    for old, new in pieces:
        difference += float((old - new).double().square().sum())
        norm += float(old.double().square().sum())
        old.copy_(new)
    return float((difference / max(norm, 1e-30)) ** 0.5)


@contextmanager
def exact_copy(folder: Path, manifest: Manifest, prompts: bool = False) -> Iterator[tuple[Path, Manifest]]:
    """A package meanwhile, of the same weights file, whose graphs leave activations as they are; with its manifest.

    Prompts by integer products have another form of the weights: the graph that theirs came from stands for them, but where
    `prompts` asks for theirs.
    onnx-ir reads no file of several names, which the weights file has meanwhile.
    """
    with _folder_for(folder) as copy:
        files = dict(manifest.files)
        for name in manifest.files:
            if not any(graph.file == name for graph in manifest.graphs.values()):
                _link(folder / name, copy / name)
        for name, graph in manifest.graphs.items():
            stands = name == "prefill" and "append" in manifest.graphs and not prompts
            exact_graph = manifest.graphs["append"] if stands else graph
            model = ir.load(folder / exact_graph.file)
            for node in list(model.graph):
                if node.op_type in ("MatMulNBits", "QMoE"):
                    node.attributes.pop("accuracy_level", None)
                if node.op_type == "QMoE" and node.attributes["expert_weight_bits"].as_int() == 8:
                    _without_int8_activations(model, node)
            for value in model.graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value.base_dir = copy
            ir.save(model, copy / graph.file)
            raw = (copy / graph.file).read_bytes()
            files[graph.file] = FileInfo(len(raw), hashlib.sha256(raw).hexdigest())
        exact = replace(manifest, files=files)
        (copy / MANIFEST_FILE).write_text(exact.to_json(), encoding="utf-8")
        yield copy, exact


def _without_int8_activations(model: ir.Model, node: ir.Node) -> None:
    """A QMoE of 8 bits, which rounds activations at every accuracy level, as a MoE of dequantized experts."""
    size = node.attributes["block_size"].as_int()
    weights = []
    for places in _INPUTS["QMoE"]:
        codes, scales, zeros = (node.inputs[i] if i < len(node.inputs) else None for i in places)
        middle = ir.tensor(np.full(scales.const_value.shape.numpy(), 128, np.uint8), name=f"{codes.name}.middle")  # type: ignore[union-attr]
        if zeros is None:
            zeros = ir.Value(name=middle.name, const_value=middle, shape=middle.shape, type=ir.TensorType(middle.dtype))
            model.graph.register_initializer(zeros)
        linear = ir.node("DequantizeLinear", [codes, scales, zeros], {"axis": 2, "block_size": size})
        model.graph.insert_before(node, linear)
        weights.append(linear.outputs[0])
    kept = {"k", "activation_type", "swiglu_fusion", "normalize_routing_weights", "activation_alpha", "activation_beta"}
    attributes = [a for name, a in node.attributes.items() if name in kept | {"swiglu_limit"}]
    inputs = [
        *node.inputs[:2],
        weights[0],
        node.inputs[4],
        weights[1],
        node.inputs[7] if len(node.inputs) > 7 else None,
    ]
    plain = ir.Node("com.microsoft", "MoE", inputs, attributes, num_outputs=1)
    model.graph.insert_before(node, plain)
    take_name(node.outputs[0], plain.outputs[0])
    model.graph.remove(node, safe=True)


@contextmanager
def _folder_for(folder: Path) -> Iterator[Path]:
    """A folder beside the package's, where its files can be linked; else one for temporary files."""
    try:
        made = Path(tempfile.mkdtemp(prefix=".exact-", dir=folder.resolve().parent))
    except OSError:
        made = Path(tempfile.mkdtemp(prefix="llmx-exact-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """`target` is `source`'s file, without a copy where the file system can."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
