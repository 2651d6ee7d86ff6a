"""Whether a manifest's parts fit each other, and the graphs that onnxruntime opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmx.runtime.dtypes import itemsize
from llmx.runtime.errors import PackageError

if TYPE_CHECKING:
    from llmx.runtime.manifest import GraphInfo, Manifest, StateTensor

CARRIED = ("grow", "replace", "cross")  # layouts whose state is passed on from each call to the next

_GRAPHS = {"decoder": ("prefill", "decode"), "encoder": ("encoder",), "encoder-decoder": ("encoder", "decode")}
_LAYOUTS = ("in_place", *CARRIED)
_STATE_DIMENSIONS = ("slots", "max_length", "source_length")
_DIMENSIONS = ("batch", "seq", "asked", *_STATE_DIMENSIONS)
_AGAIN = "the manifest is damaged: export the model again."


def check_parts(manifest: Manifest, where: str) -> None:
    """Raises PackageError, naming the part, where graphs, state and files do not fit each other.

    What a newer version may have added (another family, layout or dtype) is told apart from damage by whoever uses it.
    """
    carried = any(tensor.layout in CARRIED for tensor in manifest.state)
    for name in _GRAPHS.get(manifest.family, ()):
        if name not in manifest.graphs and not (carried and name == "prefill"):  # decode takes its prompts
            raise PackageError(f"{where}: graphs.{name} is missing; {_AGAIN}")
    for field in ("context_length", "vocab_size"):
        if getattr(manifest.model, field) < 1:
            raise PackageError(f"{where}: model.{field} must be at least 1; {_AGAIN}")
    for name, graph in manifest.graphs.items():
        if graph.file not in manifest.files:
            raise PackageError(f"{where}: graphs.{name}.file is {graph.file!r}, which files does not list; {_AGAIN}")
        for tensor in [*graph.inputs, *graph.outputs]:
            _check_shape(tensor.shape, _DIMENSIONS, f"{where}: graphs.{name}, {tensor.name}")
            itemsize(tensor.dtype)
    _check_tensors(manifest.state, carried, where)
    state = manifest.state
    own, cross = [t for t in state if t.layout != "cross"], [t for t in state if t.layout == "cross"]
    if (manifest.family == "encoder-decoder") != (manifest.seq2seq is not None):
        raise PackageError(f"{where}: seq2seq goes with the family encoder-decoder; {_AGAIN}")
    for name in {*_GRAPHS.get(manifest.family, ()), "append"} & set(manifest.graphs):
        whole = name in ("decode", "append") or (not carried and name == "prefill")
        inputs = {t.input for t in state} if whole else set()
        outputs = {t.output for t in (cross if name == "encoder" else own)}
        _check_state(manifest.graphs[name], inputs, outputs, f"{where}: graphs.{name}")


def _check_tensors(state: list[StateTensor], carried: bool, where: str) -> None:
    for index, tensor in enumerate(state):
        _check_shape(tensor.shape, _STATE_DIMENSIONS, f"{where}: state[{index}]")
        itemsize(tensor.dtype)
        if tensor.layout not in _LAYOUTS:
            raise PackageError(
                f"{where}: state[{index}] has the layout {tensor.layout!r}, which this llmx does not know; upgrade llmx."
            )
        if carried and tensor.layout == "in_place":
            raise PackageError(
                f"{where}: state[{index}] is in place and others are carried, which this llmx does not run; upgrade llmx."
            )
        if (tensor.layout in ("in_place", "grow")) != ("max_length" in tensor.shape):
            raise PackageError(f"{where}: state[{index}] has a shape that does not go with {tensor.layout!r}; {_AGAIN}")


def _check_shape(shape: list[int | str], names: tuple[str, ...], where: str) -> None:
    for dim in shape:
        if dim not in names if isinstance(dim, str) else dim < 1:
            raise PackageError(f"{where} has the dimension {dim!r}, which means nothing here; {_AGAIN}")


def _check_state(graph: GraphInfo, inputs: set[str], outputs: set[str], where: str) -> None:
    if not any(t.role in ("logits", "embeddings", "last_hidden_state", "state") for t in graph.outputs[:1]):
        raise PackageError(f"{where}: its first output is not the logits; {_AGAIN}")
    for side, tensors, known in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
        names = {t.name for t in tensors if t.role == "state"}
        for name in sorted(names ^ known):
            raise PackageError(f"{where}: the {side} {name} is in the graph or in state, and not in both; {_AGAIN}")


def why_not_on_device(manifest: Manifest) -> str | None:
    """Why a package does not run on a CUDA device, in words that end a sentence, or None where it does."""
    if manifest.family != "decoder" or any(tensor.layout != "in_place" for tensor in manifest.state):
        return "its state is carried from call to call, which runs on the CPU so far; use --device cpu"
    if manifest.target != "cuda":
        return f"it was built for {manifest.target}; export the model with --target cuda"
    if manifest.dtype == "float32":
        return "onnxruntime's attention has no float32 kernel there; export the model with --dtype fp16 or bf16"
    if not any(info.role == "next_input_ids" for info in manifest.graphs["decode"].outputs):
        return "it was written by an older llmx; export it again"
    return None


def check_session(session: Any, graph: GraphInfo, path: object) -> None:
    """Raises PackageError where the opened graph's inputs or outputs are not those that the manifest lists."""
    for side, opened, listed in (
        ("input", session.get_inputs(), graph.inputs),
        ("output", session.get_outputs(), graph.outputs),
    ):
        for name in sorted({t.name for t in opened} ^ {t.name for t in listed}):
            raise PackageError(
                f"{path} and the manifest disagree on the {side} {name}: one of them was altered; export the model again."
            )
