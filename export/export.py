"""`export_model`: load, trace, rewrite, write, verify."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmx.export.attention import LayerState
from llmx.export.checkpoint import Checkpoint, open_checkpoint
from llmx.export.lowering import uncollected
from llmx.export.package import (
    WEIGHTS_FILE,
    check_free_space,
    describe_graph,
    hash_files,
    package_folder,
    write_graphs,
    write_manifest,
)
from llmx.export.passes import both_graphs
from llmx.export.targets import TARGETS, Target
from llmx.export.tokenizer import generation_defaults, load_tokenizer, write_tokenizer
from llmx.export.trace import probe_layers, state_names, trace
from llmx.export.verify import verify
from llmx.export.weights import SourceModel, build_source
from llmx.export.writer import WeightsWriter
from llmx.runtime.errors import ExportError, UnsupportedModelError
from llmx.runtime.manifest import FileInfo, Manifest, ModelInfo, StateTensor, Verification

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how. `dtype` and `max_length` of None mean the target's default and the model's context."""

    model: str
    output: Path | None = None
    target: str = "cpu"
    dtype: str | None = None
    max_length: int | None = None
    revision: str | None = None
    adapter: Path | None = None
    trust_remote_code: bool = False
    force: bool = False
    verify: bool = True
    task: str = "auto"
    pooling: str | None = None


@dataclass(frozen=True)
class ExportResult:
    """Where the package lies, what it holds, how long each stage took (seconds) and what the user should know."""

    path: Path
    manifest: Manifest
    seconds: dict[str, float]
    warnings: list[str]


class Reporter:
    """Receives progress; the base class ignores it. `advance` counts within a stage, in units of the stage."""

    def stage(self, name: str) -> None: ...

    def advance(self, done: int, total: int) -> None: ...


class _Stages:
    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", 0.0

    def begin(self, name: str) -> None:
        self.end()
        self._name, self._start = name, time.perf_counter()
        self.reporter.stage(name)

    def end(self) -> None:
        if self._name:
            self.seconds[self._name] = time.perf_counter() - self._start
            self._name = ""


def export_model(options: ExportOptions, reporter: Reporter | None = None) -> ExportResult:
    """Export a causal language model or an encoder to a package and verify it against PyTorch.

    Raises CheckpointError, UnsupportedModelError, VerificationError or ExportError; in each case nothing is left at the
    output.
    """
    stages = _Stages(reporter or Reporter())
    warnings: list[str] = []
    stages.begin("load")
    target = _target(options.target)
    checkpoint = open_checkpoint(options.model, options.revision, options.trust_remote_code, options.task)
    if options.pooling is not None and checkpoint.task != "embed":
        raise ExportError(
            f"--pooling goes with embedding models, and this is exported for {checkpoint.task}; leave it out."
        )
    if options.max_length is not None and checkpoint.task != "generate":
        raise ExportError("--max-length goes with models that generate; an encoder takes what it was trained for.")
    output = options.output or Path("artifacts") / checkpoint.short_name
    dtype = _dtype(options, target, checkpoint)
    with package_folder(output, options.force) as folder, torch.no_grad():
        write = _write_package if checkpoint.task == "generate" else _write_encoder
        manifest = write(folder, checkpoint, options, target, dtype, stages, warnings)
        stages.begin("verify")
        manifest = _verified(manifest, folder, checkpoint, options, stages.reporter)
        if manifest.verification.status == "skipped" and options.verify:
            warnings.append(f"The package was not verified: {manifest.verification.reason}.")
        write_manifest(folder, manifest)
    stages.end()
    return ExportResult(output, manifest, stages.seconds, warnings)


def _write_package(
    folder: Path,
    checkpoint: Checkpoint,
    options: ExportOptions,
    target: Target,
    dtype: str,
    stages: _Stages,
    warnings: list[str],
) -> Manifest:
    """Everything of the package but the manifest, which is returned. The model is released with this call's locals."""
    tokenizer = write_tokenizer(checkpoint, folder)
    defaults, ignored = generation_defaults(checkpoint)
    if ignored:
        warnings.append(
            f"generation_config sets {', '.join(ignored)}, which llmx does not apply; "
            "output may differ from transformers' default."
        )
    source = build_source(checkpoint, getattr(torch, dtype), options.adapter)
    _check_vocabulary(source, folder, tokenizer.file)

    stages.begin("trace")
    layers = _explain(checkpoint, lambda: probe_layers(source.module))
    context = _context_length(checkpoint, options.max_length)
    check_free_space(folder, int(source.num_bytes * 1.02))
    with WeightsWriter(folder / WEIGHTS_FILE, source) as writer, uncollected():
        traced = _explain(checkpoint, lambda: trace(source.module, layers, target.query_seqlens))
        stages.begin("rewrite")
        prefill, decode = both_graphs(traced, context)
        stages.begin("write")
        graphs = {"prefill.onnx": prefill, "decode.onnx": decode}
        write_graphs(folder, graphs, writer, source, stages.reporter.advance)
    numbers = [layer.layer for layer in layers]
    vocab = int(prefill.graph.outputs[0].shape[2])
    return Manifest(
        family="decoder",
        name=checkpoint.short_name,
        target=target.name,
        dtype=dtype,
        model=ModelInfo(context, vocab, _hidden_size(source), len(layers), source.num_parameters),
        graphs={
            "prefill": describe_graph("prefill.onnx", prefill, numbers),
            "decode": describe_graph("decode.onnx", decode, numbers),
        },
        state=_state(layers, dtype),
        tokenizer=tokenizer,
        generation=defaults,
        source=_source_info(checkpoint, options, source),
        created_by=_versions(),
        verification=Verification("skipped", reason="not verified yet"),
        files=hash_files(folder, {WEIGHTS_FILE: FileInfo(writer.size, writer.sha256)}),
        min_onnxruntime=target.min_onnxruntime,
    )


def _write_encoder(
    folder: Path,
    checkpoint: Checkpoint,
    options: ExportOptions,
    target: Target,
    dtype: str,
    stages: _Stages,
    warnings: list[str],
) -> Manifest:
    """An encoder's package but its manifest, which is returned."""
    from llmx.export.encoder import build_module, describe_encoder, trace_encoder
    from llmx.export.passes import encoder_graph

    tokenizer = write_tokenizer(checkpoint, folder)
    source = build_source(checkpoint, getattr(torch, dtype), options.adapter)
    _check_vocabulary(source, folder, tokenizer.file)
    stages.begin("trace")
    module = _explain(
        checkpoint, lambda: build_module(checkpoint, source.module, getattr(torch, dtype), options.pooling)
    )
    check_free_space(folder, int(source.num_bytes * 1.02))
    with WeightsWriter(folder / WEIGHTS_FILE, source) as writer, uncollected():
        traced = _explain(checkpoint, lambda: trace_encoder(module))
        stages.begin("rewrite")
        graph = encoder_graph(traced)
        stages.begin("write")
        write_graphs(folder, {"encoder.onnx": graph}, writer, source, stages.reporter.advance)
    info = _explain(checkpoint, lambda: describe_encoder(checkpoint, module, graph, load_tokenizer(checkpoint)))
    rows, width = _embedding_shape(source)
    layers = next(
        (
            v
            for n in ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
            if (v := getattr(checkpoint.config, n, None))
        ),
        0,
    )
    return Manifest(
        family="encoder",
        name=checkpoint.short_name,
        target=target.name,
        dtype=dtype,
        model=ModelInfo(
            info.max_length,
            rows,
            width,
            int(layers),
            source.num_parameters,
        ),
        graphs={"encoder": describe_graph("encoder.onnx", graph, [])},
        state=[],
        tokenizer=tokenizer,
        generation={},
        source=_source_info(checkpoint, options, source),
        created_by=_versions(),
        verification=Verification("skipped", reason="not verified yet"),
        files=hash_files(folder, {WEIGHTS_FILE: FileInfo(writer.size, writer.sha256)}),
        min_onnxruntime=target.min_onnxruntime,
        encoder=info,
    )


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ExportError(f"There is no target {name!r}; choose one of {', '.join(TARGETS)}.")
    return TARGETS[name]


def _dtype(options: ExportOptions, target: Target, checkpoint: Checkpoint) -> str:
    if options.dtype is not None:
        if options.dtype not in DTYPES:
            raise ExportError(f"There is no dtype {options.dtype!r}; choose one of {', '.join(DTYPES)}.")
        return DTYPES[options.dtype]
    own = str(getattr(checkpoint.config, "dtype", None)).removeprefix("torch.")
    return own if target.default_dtype is None and own in DTYPES.values() else target.default_dtype or "float16"


def _context_length(checkpoint: Checkpoint, wanted: int | None) -> int:
    config = checkpoint.config.get_text_config(decoder=True)
    known = next(
        (
            v
            for n in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
            if (v := getattr(config, n, None))
        ),
        None,
    )
    if known is None and wanted is None:
        raise ExportError(f"{checkpoint.name} does not say how long its context is; give --max-length.")
    if wanted is not None and (wanted < 2 or (known is not None and wanted > known)):
        raise ExportError(
            f"--max-length must lie between 2 and the model's context of {known} positions, and is {wanted}."
        )
    return int(wanted or known or 0)


def _check_vocabulary(source: SourceModel, folder: Path, tokenizer_file: str) -> None:
    """A token past the embedding would read beyond it at run time."""
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(folder / tokenizer_file)).get_vocab(with_added_tokens=True)
    rows = _embedding_shape(source)[0]
    highest = max(tokens.values(), default=0)
    if highest >= rows:
        raise ExportError(
            f"The tokenizer has token id {highest} and the model only {rows} embeddings; they do not belong together."
        )


def _explain(checkpoint: Checkpoint, work: Callable[[], Any]) -> Any:
    """Run `work`, prefixing whatever it finds unsupported with the architecture's name."""
    try:
        return work()
    except UnsupportedModelError as error:
        architecture = (getattr(checkpoint.config, "architectures", None) or [checkpoint.config.model_type])[0]
        raise UnsupportedModelError(f"{architecture} cannot be exported: {error}") from error.__cause__


def _embedding_shape(source: SourceModel) -> tuple[int, int]:
    """(rows, width) of the input embedding. Raises UnsupportedModelError where it is no plain table."""
    table = getattr(source.module.get_input_embeddings(), "weight", None)
    if not isinstance(table, torch.Tensor) or table.ndim != 2:
        raise UnsupportedModelError(
            f"{type(source.module).__name__} cannot be exported: it has no table of token embeddings"
        )
    return int(table.shape[0]), int(table.shape[1])


def _hidden_size(source: SourceModel) -> int:
    return _embedding_shape(source)[1]


def _state(layers: list[LayerState], dtype: str) -> list[StateTensor]:
    return [
        StateTensor(
            s.layer, part, "in_place", past, present, dtype, ["slots", s.kv_heads, "max_length", s.head_dim], s.window
        )
        for s in layers
        for part, past, present in state_names(s.layer)
    ]


def _source_info(checkpoint: Checkpoint, options: ExportOptions, source: SourceModel) -> dict[str, Any]:
    return {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "architecture": type(source.module).__name__,
        "model_type": checkpoint.config.model_type,
        "adapter": options.adapter.name if options.adapter else None,
    }


def _versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name) for name in ("llmx", "torch", "transformers", "onnx-ir", "onnxscript")
    }


def _verified(
    manifest: Manifest, folder: Path, checkpoint: Checkpoint, options: ExportOptions, reporter: Reporter
) -> Manifest:
    from dataclasses import replace

    from llmx.export.targets import cannot_verify

    reason = "--no-verify was given" if not options.verify else cannot_verify(manifest)
    if reason is not None:
        return replace(manifest, verification=Verification("skipped", reason=reason))
    from llmx.runtime.llm import open_backend, open_encoder

    if manifest.encoder is not None:
        from llmx.export.encoder import verify_encoder

        encoder = open_encoder(folder, manifest, device="cpu", mapped_cache=False)
        checked, pads = verify_encoder(
            encoder.run, checkpoint, manifest.dtype, options.pooling, manifest.encoder.max_length
        )
        return replace(manifest, verification=checked, encoder=replace(manifest.encoder, padding=pads))
    windows = sorted({t.window for t in manifest.state if t.window is not None})
    longest = min(manifest.model.context_length, 2048)
    backend = open_backend(folder, manifest, device="cpu", max_length=longest, slots=4, mapped_cache=False)
    try:
        result = verify(backend, checkpoint, options.adapter, manifest.dtype, windows, reporter.advance)
    finally:
        backend.close()
    return replace(manifest, verification=result)
