"""Where a package and PyTorch part: the first layer whose output is nowhere in the graph.

The package's graph is opened once more with every value of the hidden size as a further output, and run on tokens that
went wrong. PyTorch's layers are watched by hooks. No names are needed: a layer agrees where some value of the graph
equals its output. What follows a wrong layer is wrong as well, so the two part after the last layer that agrees, and an
output that a fusion leaves unwritten hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from llmx.runtime.dtypes import numpy_dtype
from llmx.runtime.manifest import Manifest
from llmx.runtime.providers import import_onnxruntime
from llmx.runtime.sessions import SessionSettings, session_options

_POSITIONS = 64  # the last so many positions are compared; earlier ones say nothing more
_WITH_SUM = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class Parting:
    """`layer` counts from 0; None where no layer is to blame or none can be told. `sentence` says it in words."""

    layer: int | None
    sentence: str


def find_parting(
    folder: Path,
    manifest: Manifest,
    graph: str,
    model: Any,
    tokens: np.ndarray,
    reference: Callable[[], np.ndarray],
    tolerance: float,
    threshold: float,
    threads: int | None,
) -> Parting:
    """Bisect graph `graph` ("prefill", "decode", "encoder") on int64 [n] `tokens`.

    `reference` runs PyTorch's `model` on the same tokens and returns its first output, as wide as the graph's or narrower. `tolerance`
    is the comparison's, `threshold` the relative difference from which a layer's output counts as another.
    """
    with watched(model) as states:
        want = reference()
    if len(states) < 2:
        return Parting(None, "The layer cannot be told: the model keeps its layers in no list that was found.")
    try:
        got, values = graph_values(folder, manifest, graph, tokens, int(states[0].shape[-1]), threads)
    except Exception as error:  # a hint for a failure that is reported anyway, whatever onnxruntime makes of it
        return Parting(None, f"The layer cannot be told: the graph does not run by itself ({_line(error)}).")
    got = got[:, : want.shape[1]]
    if float(np.abs(got - want).max()) <= tolerance * max(1.0, float(np.abs(want).max())):
        return Parting(
            None,
            f"Run by itself, without batch or chunks, the {graph} graph agrees with PyTorch: the state is what differs.",
        )
    return _verdict(_errors(states, values), threshold)


def find_seq2seq_parting(
    folder: Path,
    manifest: Manifest,
    model: Any,
    source: np.ndarray,
    tokens: np.ndarray,
    reference: Callable[[], np.ndarray],
    tolerance: float,
    threshold: float,
    threads: int | None,
) -> Parting:
    """As `find_parting`, for an encoder-decoder: the encoder's layers on `source` (int64 [n], or features [mels, frames]),
    then the decoder's on int64 `tokens` after it. `reference` runs PyTorch's `model` on both and returns its logits.
    """
    with watched(model.get_encoder()) as heard, watched(model.get_decoder()) as said:
        want = reference()
    if len(heard) < 2 or len(said) < 2:
        return Parting(None, "The layer cannot be told: the model keeps its layers in no list that was found.")
    try:
        encoder, added = _exposed(folder, manifest, "encoder", int(heard[0].shape[-1]), threads)
        cross = [(tensor.input, tensor.output) for tensor in manifest.state if tensor.layout == "cross"]
        [name] = [info.name for info in encoder.get_inputs()]
        wanted = [*added, *(output for _, output in cross)]
        results = dict(zip(wanted, encoder.run(wanted, {name: source[None]}), strict=True))
        state = {name: results[output] for name, output in cross}
        got, values = graph_values(folder, manifest, "decode", tokens, int(said[0].shape[-1]), threads, state)
    except Exception as error:  # as in find_parting
        return Parting(None, f"The layer cannot be told: the graphs do not run by themselves ({_line(error)}).")
    written = [_rows(results[name])[-_POSITIONS:].astype(np.float32) for name in added]
    verdict = _verdict(_errors(heard, written), threshold, "the encoder's ")
    if verdict.layer is not None or _errors(heard, written)[-1] > threshold:
        return verdict
    if float(np.abs(got[:, : want.shape[1]] - want).max()) <= tolerance * max(1.0, float(np.abs(want).max())):
        return Parting(None, "Run by themselves, the graphs agree with PyTorch: the state is what differs.")
    return _verdict(_errors(said, values), threshold, "the decoder's ")


def _errors(states: list[np.ndarray], values: list[np.ndarray]) -> list[float]:
    """How far each state is from the value nearest to it."""
    alike = [[value for value in values if value.shape == state.shape] for state in states]
    return [min((_distance(v, s) for v in vs), default=np.inf) for s, vs in zip(states, alike, strict=True)]


def _verdict(errors: list[float], threshold: float, side: str = "") -> Parting:
    """From the distances of the embeddings and of each layer's output. `side`: whose layers, where a model has two kinds."""
    agreeing = [index for index, error in enumerate(errors) if error <= threshold]
    last = max(agreeing, default=-1)
    if last == len(errors) - 1:
        return Parting(None, f"They part after {side or 'the '}last layer (final norm or output head).")
    if last == -1:
        return Parting(
            None, f"They part before {side}layer 0 (the embeddings), or no layer's output is found in the graph."
        )
    before = "the embeddings" if last == 0 else f"layer {last - 1}"
    final = ", or in the final norm" if last == len(errors) - 2 else ""
    return Parting(
        last,
        f"They part in {side}layer {last} of 0 … {len(errors) - 2}{final}: {before} still agree{'s' * (last > 0)}.",
    )


def _distance(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference of [n, hidden], each position relative to its largest value; NaN counts as infinite."""
    scale = np.maximum(np.abs(want).max(axis=1), 1e-6)
    distance = float((np.abs(got - want).max(axis=1) / scale).max())
    return distance if np.isfinite(distance) else np.inf


@contextmanager
def watched(model: Any) -> Iterator[list[np.ndarray]]:
    """The input of the first layer, then every layer's output, float32 [n, hidden] of the first row, for the last
    positions of what is run meanwhile. Nothing is collected where the layers are not found.
    """
    states: list[np.ndarray] = []

    def keep(value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        if isinstance(tensor, torch.Tensor) and tensor.ndim == 3:
            if tensor.shape[1] == 1 < tensor.shape[0]:  # positions first, in older models
                tensor = tensor.transpose(0, 1)
            states.append(tensor[0, -_POSITIONS:].detach().float().numpy().copy())

    def before(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep(arguments[0] if arguments else named.get("hidden_states"))

    layers = _layers(model)
    handles = [layer.register_forward_hook(lambda _, __, output: keep(output)) for layer in layers]
    if layers:
        handles.append(layers[0].register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: Any) -> list[Any]:
    """The outermost list of as many modules as the config has layers; in half of an encoder-decoder, the outermost list."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    half = getattr(model.config, "is_encoder_decoder", False)
    found = (list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return next((layers for layers in found if half or len(layers) == count), [])


def _exposed(folder: Path, manifest: Manifest, graph: str, hidden: int, threads: int | None) -> tuple[Any, list[str]]:
    """A session of a graph, opened in memory, with every value of the `hidden` size as a further output, and their names."""
    model = ir.load(folder / manifest.graphs[graph].file)
    added = _expose(model, hidden)
    options = session_options(SessionSettings(threads))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    proto = ir.serde.serialize_model(model).SerializeToString()
    return import_onnxruntime().InferenceSession(proto, options, providers=["CPUExecutionProvider"]), added


def graph_values(
    folder: Path,
    manifest: Manifest,
    graph: str,
    tokens: np.ndarray,
    hidden: int,
    threads: int | None,
    cross: dict[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Run a graph on int64 [n] `tokens` from an empty state (but for `cross`, by input): its first output (float32 [n, width], or [1, width] of an
    encoder that gives one vector), and every value of the hidden size, float32 [last positions, hidden].
    """
    session, added = _exposed(folder, manifest, graph, hidden, threads)
    stepwise = graph == "decode"
    feeds = _empty_state(manifest, len(tokens)) | (cross or {})
    first = manifest.graphs[graph].outputs[0].name
    state = [(t.input, t.output) for t in manifest.state if stepwise and t.layout != "cross"]
    wanted = [first, *added, *(output for _, output in state)]
    outputs: list[list[np.ndarray]] = []
    for start in range(0, len(tokens), 1 if stepwise else len(tokens)):
        _place(feeds, tokens, start, 1 if stepwise else len(tokens))
        names = {info.name for info in session.get_inputs()}
        results = dict(zip(wanted, session.run(wanted, {k: v for k, v in feeds.items() if k in names}), strict=True))
        feeds |= {name: results[output] for name, output in state}
        outputs.append([results[name] for name in (first, *added)])
    joined = [np.concatenate([_rows(step[i]) for step in outputs]) for i in range(1 + len(added))]
    kept = [value[-_POSITIONS:].astype(np.float32) for value in joined[1:] if value.shape == (len(tokens), hidden)]
    return joined[0].astype(np.float32), kept


def _rows(value: np.ndarray) -> np.ndarray:
    """[1, n, width] (or [1, width]) as [n, width]."""
    return value.reshape(-1, value.shape[-1])


def _expose(model: ir.Model, hidden: int) -> list[str]:
    """Make outputs of all float values whose last size is `hidden`; their names."""
    graph = model.graph
    present = {value.name for value in graph.outputs}
    names: list[str] = []
    for node in graph:
        if node.op_type in _WITH_SUM and len(node.outputs) < 4:
            node.resize_outputs(4)
        if node.op_type in _WITH_SUM and not node.outputs[3].name:  # the residual sum, which nobody downstream reads
            node.outputs[3].name = f"{node.outputs[0].name}.residual_sum"
            node.outputs[3].type, node.outputs[3].shape = node.outputs[0].type, node.outputs[0].shape
        for value in node.outputs:
            if value.name and value.name not in present and _may_hold(value, hidden):
                graph.outputs.append(value)
                names.append(value.name)
    return names


def _may_hold(value: ir.Value, hidden: int) -> bool:
    if value.dtype not in _FLOATS or value.shape is None or len(value.shape) not in (2, 3):
        return False
    return value.shape[-1] == hidden


def _empty_state(manifest: Manifest, length: int) -> dict[str, np.ndarray]:
    """The empty state of one row that has room for `length` positions."""
    feeds = {}
    for tensor in manifest.state:
        room = length if tensor.layout == "in_place" else 0
        sizes = {"slots": 1, "max_length": room}
        shape = [sizes.get(dim, 0) if isinstance(dim, str) else dim for dim in tensor.shape]
        feeds[tensor.input] = np.zeros(shape, numpy_dtype(tensor.dtype))
    return feeds


def _place(feeds: dict[str, np.ndarray], tokens: np.ndarray, start: int, count: int) -> None:
    """Put `count` of the tokens from `start` on into the inputs, whose names are their roles'."""
    feeds |= {
        "input_ids": tokens[None, start : start + count],
        "position_ids": np.arange(start, start + count)[None],
        "logits_positions": np.arange(count)[None],
        "seqlens_k": np.array([start + count - 1], np.int32),
        "total_sequence_length": np.array(start + count, np.int32),
        "query_seqlens": np.array([count], np.int32),
        "rope_lengths": np.full((1, count), len(tokens)),
        "attention_mask": np.ones((1, count), np.int64),
        "token_type_ids": np.zeros((1, count), np.int64),
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
