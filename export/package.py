"""Writing a package: weights once, two graphs that point at them, then the manifest that vouches for all."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from llmx.export.folder import check_free_space, package_folder
from llmx.export.packed import is_parameter, parameter_names
from llmx.export.quantized_graph import KEY, PREFIX
from llmx.export.weights import SourceModel
from llmx.export.writer import INLINE_BELOW, Progress, WeightsWriter
from llmx.runtime.errors import ExportError
from llmx.runtime.manifest import MANIFEST_FILE, FileInfo, GraphInfo, Manifest, TensorInfo, WeightTensor

__all__ = [
    "WEIGHTS_FILE",
    "check_free_space",
    "describe_graph",
    "describe_weights",
    "dtype_name",
    "hash_files",
    "package_folder",
    "write_graphs",
    "write_manifest",
]

WEIGHTS_FILE = "weights.data"


def write_graphs(
    folder: Path, graphs: dict[str, ir.Model], writer: WeightsWriter, source: SourceModel, progress: Progress
) -> None:
    """Finish `weights.data` and write one file per graph. Initializers with the same name are the same tensor."""
    parameters = source.parameters_by_name()
    further: dict[str, Callable[[], bytes]] = {}
    large: list[tuple[ir.Value, list[str]]] = []  # a value, and what its bytes are written under
    for model in graphs.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if KEY in value.metadata_props:  # a part of a quantized matrix, or of several side by side
                large.append((value, value.metadata_props[KEY].split("\n")))
                continue
            if tensor is None or value.name is None:
                continue
            bound = [parameters[name.removeprefix(PREFIX)] for name in parameter_names(value) if is_parameter(value)]
            # a parameter's own memory may be uninitialised: its values are read from the checkpoint
            read = functools.partial(_read, source, bound) if bound else tensor.tobytes
            if tensor.nbytes < INLINE_BELOW:
                value.const_value = _inline(tensor, read()) if bound else tensor
            elif not bound or any(parameter.nbytes < INLINE_BELOW for _, parameter in bound):
                further[value.name] = read
                large.append((value, [value.name]))
            else:
                large.append((value, [key for key, _ in bound]))
    used = {key for _, keys in large for key in keys} - further.keys()
    spans = writer.finish(used, further, progress, [keys for _, keys in large if len(keys) > 1])
    for value, keys in large:
        assert value.name is not None and value.dtype is not None and isinstance(value.shape, ir.Shape)
        offset, length = spans[keys[0]][0], sum(spans[key][1] for key in keys)
        assert sum(spans[keys[-1]]) == offset + length, value.name
        expected = math.prod(value.shape.numpy()) * value.dtype.itemsize
        if length != expected:
            raise ExportError(f"{keys[0]} has {length} bytes in the checkpoint and {expected} in the graph.")
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, offset, length, value.dtype, shape=value.shape, name=value.name, base_dir=folder
        )
    for name, model in graphs.items():
        _strip(model)
        ir.save(model, folder / name)


def _read(source: SourceModel, bound: list[tuple[str, Any]]) -> bytes:
    return b"".join(chunk for name, parameter in bound for chunk in source.chunks(name, parameter))


def _inline(tensor: ir.TensorProtocol, raw: bytes) -> ir.TensorProtocol:
    import numpy as np

    array = np.frombuffer(raw, dtype=tensor.dtype.numpy()).reshape(tensor.shape.numpy())
    return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)


def _strip(model: ir.Model) -> None:
    """Drop what the exporter notes on each node (stack traces, signatures): paths of the exporting machine among them."""
    model.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.producer_name, model.producer_version = "llmx", None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None


def describe_weights(graphs: dict[str, ir.Model]) -> list[WeightTensor]:
    """Every tensor of the weights' file that a graph reads, by name, once."""
    found: dict[str, WeightTensor] = {}
    for model in graphs.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                shape = [int(dim) for dim in tensor.shape.numpy()]
                offset, length = int(tensor.offset or 0), int(tensor.length or 0)
                found[tensor.name] = WeightTensor(tensor.name, dtype_name(tensor.dtype), shape, offset, length)
    return sorted(found.values(), key=lambda weight: (weight.offset, weight.name))


def describe_graph(file: str, model: ir.Model, state: set[str]) -> GraphInfo:
    """The manifest's entry of a graph: each input and output with its role, dtype and shape; `state` names the state's."""

    def info(value: ir.Value) -> TensorInfo:
        assert value.name is not None and value.dtype is not None and value.shape is not None
        shape = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
        return TensorInfo(value.name, "state" if value.name in state else value.name, dtype_name(value.dtype), shape)

    return GraphInfo(file, [info(v) for v in model.graph.inputs], [info(v) for v in model.graph.outputs])


def dtype_name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32"}.get(dtype.name, dtype.name.lower())


def hash_files(folder: Path, known: dict[str, FileInfo]) -> dict[str, FileInfo]:
    """Size and sha256 of every file of the package but its manifest; `known` were hashed while they were written."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST_FILE):
        if path.name in known:
            files[path.name] = known[path.name]
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = FileInfo(path.stat().st_size, digest)
    return files


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
