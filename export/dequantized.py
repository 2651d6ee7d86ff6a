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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from llmx.export.blocks import Blocks, Scheme, unpacked
from llmx.export.quantized_graph import PREFIX
from llmx.runtime.errors import VerificationError
from llmx.runtime.manifest import MANIFEST_FILE, FileInfo, Manifest

#: Largest distance of a quantized matrix from its source, as a part of the source's norm. Rounding 4-bit blocks costs 0.1,
#: a calibrated method twice that; a wrong matrix about 1.4.
_LARGEST_ERROR = {8: 0.05, 4: 0.4}
_ROWS = 1 << 22  # values unpacked at once
_INPUTS = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}  # codes, scales, zero points


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [rows, columns] as a package's weights file holds it: arrays mapped from there, zero points as stored."""

    scheme: Scheme
    shape: tuple[int, int]
    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None

    def rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, float32 [n, columns]), a few rows after the other."""
        rows, columns = self.shape
        step = max(1, _ROWS // columns)
        for start in range(0, rows, step):
            count = min(step, rows - start)

            def part(array: np.ndarray, start: int = start, count: int = count) -> torch.Tensor:
                return torch.from_numpy(array[start : start + count].reshape(count, -1).copy())

            codes = unpacked(part(self.codes), self.scheme.bits, columns)
            zeros = self.zero_points
            unpacked_zeros = (
                None if zeros is None else unpacked(part(zeros), self.scheme.bits, self.scheme.blocks(columns))
            )
            scales = part(self.scales.astype(np.float32))
            yield start, Blocks(self.scheme, codes, scales, unpacked_zeros).dequantized()


def quantized_matrices(folder: Path, manifest: Manifest) -> dict[str, StoredMatrix]:
    """Every matrix that a graph of the package reads quantized, by its parameter's name."""
    found: dict[str, StoredMatrix] = {}
    for graph in manifest.graphs.values():
        for node in ir.load(folder / graph.file).graph:
            if node.op_type in _INPUTS:
                codes, scales, zero_points = (
                    node.inputs[i] if i < len(node.inputs) else None for i in _INPUTS[node.op_type]
                )
                assert codes is not None and codes.name is not None
                name = codes.name.removeprefix(PREFIX).rpartition(".")[0]
                found.setdefault(name, _stored(node, _array(codes), _array(scales), _array(zero_points)))
    return found


def _stored(
    node: ir.Node, codes: np.ndarray | None, scales: np.ndarray | None, zeros: np.ndarray | None
) -> StoredMatrix:
    assert codes is not None and scales is not None
    scheme = Scheme(node.attributes["bits"].as_int(), node.attributes["block_size"].as_int(), zeros is None)
    given = node.attributes.get("K")
    columns = given.as_int() if given is not None else codes.shape[1] * 8 // scheme.bits
    return StoredMatrix(scheme, (codes.shape[0], columns), codes, scales, zeros)


def _array(value: ir.Value | None) -> np.ndarray | None:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def use_package_weights(model: Any, matrices: dict[str, StoredMatrix], check: bool = True) -> None:
    """Overwrite the float32 `model`'s matrices with what a package holds for them.

    Raises VerificationError where a matrix is not the model's, rounded (`check`).
    """
    from transformers.pytorch_utils import Conv1D

    parameters = dict(model.named_parameters(remove_duplicate=False))
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, matrix in matrices.items():
        bits = matrix.scheme.bits
        target = parameters[name].data.T if name in turned else parameters[name].data
        if tuple(target.shape) != matrix.shape:
            raise VerificationError(
                f"{name} is {list(target.shape)} in PyTorch and {list(matrix.shape)} in the package."
            )
        difference = norm = 0.0
        for start, rows in matrix.rows():
            old = target[start : start + len(rows)]
            difference += float((old - rows).double().square().sum())
            norm += float(old.double().square().sum())
            old.copy_(rows)
        if check and not difference <= _LARGEST_ERROR[bits] ** 2 * norm:
            raise VerificationError(
                f"The quantized {name} is not its source rounded to {bits} bits: they lie "
                f"{(difference / max(norm, 1e-30)) ** 0.5:.2g} of its norm apart (at most {_LARGEST_ERROR[bits]:g} is rounding)."
            )


@contextmanager
def exact_copy(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, Manifest]]:
    """A package meanwhile, of the same weights file, whose graphs leave activations as they are; with its manifest.

    onnx-ir reads no file of several names, which the weights file has meanwhile.
    """
    with _folder_for(folder) as copy:
        files = dict(manifest.files)
        for name in manifest.files:
            if not any(graph.file == name for graph in manifest.graphs.values()):
                _link(folder / name, copy / name)
        for graph in manifest.graphs.values():
            model = ir.load(folder / graph.file)
            for node in model.graph:
                if node.op_type == "MatMulNBits":
                    node.attributes.pop("accuracy_level", None)
            for value in model.graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value.base_dir = copy
            ir.save(model, copy / graph.file)
            raw = (copy / graph.file).read_bytes()
            files[graph.file] = FileInfo(len(raw), hashlib.sha256(raw).hexdigest())
        exact = replace(manifest, files=files)
        (copy / MANIFEST_FILE).write_text(exact.to_json(), encoding="utf-8")
        yield copy, exact


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
