"""`export_model`: load, trace, rewrite, write, verify."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from llmx.export.attention import IMPLEMENTATION, LayerState
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
from llmx.export.rope import LengthRule, length_rule
from llmx.export.targets import TARGETS, Target
from llmx.export.tokenizer import generation_defaults, load_tokenizer, write_tokenizer
from llmx.export.trace import probe_layers, state_names, trace
from llmx.export.verify import verify
from llmx.export.weights import SourceModel, build_source
from llmx.export.writer import WeightsWriter
from llmx.runtime.errors import ExportError, UnsupportedModelError
from llmx.runtime.manifest import FileInfo, Manifest, ModelInfo, StateTensor, TokenizerInfo, Verification

_UNLIMITED = 1 << 20  # positions of a model that nothing limits
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
        write = _write_decoder if checkpoint.task == "generate" else _write_encoder
        manifest = write(_Work(folder, checkpoint, options, target, dtype, stages, warnings))
        stages.begin("verify")
        manifest = _verified(manifest, folder, checkpoint, options, stages.reporter)
        if manifest.verification.status == "skipped" and options.verify:
            warnings.append(f"The package was not verified: {manifest.verification.reason}.")
        write_manifest(folder, manifest)
    stages.end()
    return ExportResult(output, manifest, stages.seconds, warnings)


@dataclass
class _Work:
    """One export's settings and what it has made so far, for the two kinds of package."""

    folder: Path
    checkpoint: Checkpoint
    options: ExportOptions
    target: Target
    dtype: str
    stages: _Stages
    warnings: list[str]

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def source(self, tokenizer_file: str, attention: str | None) -> SourceModel:
        """The model to trace with this attention implementation, its vocabulary checked against the tokenizer's."""
        source = build_source(self.checkpoint, self.torch_dtype, self.options.adapter, attention)
        _check_vocabulary(source, self.folder, tokenizer_file)
        return source

    def write(
        self, source: SourceModel, make: Callable[[], dict[str, ir.Model]]
    ) -> tuple[dict[str, ir.Model], dict[str, FileInfo]]:
        """`make` the graphs by name while the weights are written; the graphs, and what is known of the weights' file."""
        check_free_space(self.folder, int(source.num_bytes * 1.02))
        with WeightsWriter(self.folder / WEIGHTS_FILE, source) as writer, uncollected():
            graphs = make()
            self.stages.begin("write")
            files = {_graph_file(name): graph for name, graph in graphs.items()}
            write_graphs(self.folder, files, writer, source, self.stages.reporter.advance)
        return graphs, {WEIGHTS_FILE: FileInfo(writer.size, writer.sha256)}

    def manifest(
        self, source: SourceModel, graphs: dict[str, ir.Model], hashed: dict[str, FileInfo], **parts: Any
    ) -> Manifest:
        """The manifest of `parts` with what every family has, not verified yet."""
        state = {name for tensor in parts["state"] for name in (tensor.input, tensor.output)}
        return Manifest(
            name=self.checkpoint.short_name,
            target=self.target.name,
            dtype=self.dtype,
            graphs={name: describe_graph(_graph_file(name), graph, state) for name, graph in graphs.items()},
            source=_source_info(self.checkpoint, self.options, source),
            created_by=_versions(),
            verification=Verification("skipped", reason="not verified yet"),
            files=hash_files(self.folder, hashed),
            min_onnxruntime=self.target.min_onnxruntime,
            **parts,
        )


def _graph_file(name: str) -> str:
    return f"{name}.onnx"


def _write_decoder(work: _Work) -> Manifest:
    """Everything of the package but the manifest, which is returned. The model is released with this call's locals."""
    checkpoint = work.checkpoint
    tokenizer = write_tokenizer(checkpoint, load_tokenizer(checkpoint), work.folder)
    defaults, ignored = generation_defaults(checkpoint)
    if ignored:
        work.warnings.append(
            f"generation_config sets {', '.join(ignored)}, which llmx does not apply; "
            "output may differ from transformers' default."
        )
    try:
        return _write_in_place(work, tokenizer, defaults)
    except UnsupportedModelError as error:
        reason = error
    try:
        return _write_carried(work, tokenizer, defaults)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{reason}; as plain ONNX: {error}") from error


def _write_carried(work: _Work, tokenizer: TokenizerInfo, defaults: dict[str, Any]) -> Manifest:
    """With state that is carried from call to call (llmx.export.carried)."""
    from llmx.export.carried import MIN_PREFILL, carried_graphs, probe_carried

    source = work.source(tokenizer.file, "eager")
    work.stages.begin("trace")
    carried = probe_carried(source.module)
    context = _context_length(work.checkpoint, work.options.max_length, 1.0, source.module)
    graphs, hashed = work.write(source, lambda: carried_graphs(source.module, carried))
    if "prefill" not in graphs:
        work.warnings.append(
            "The prompt cannot be traced as a whole (its code loops over it), so it runs token by token."
        )
    vocab = int(graphs["decode"].graph.outputs[0].shape[2])
    layers = len(carried.template.layers)
    return work.manifest(
        source,
        graphs,
        hashed,
        family="decoder",
        model=ModelInfo(
            context, vocab, _embedding_shape(source)[1], layers, source.num_parameters, min_prefill=MIN_PREFILL
        ),
        state=carried.describe(),
        tokenizer=tokenizer,
        generation=defaults,
    )


def _write_in_place(work: _Work, tokenizer: TokenizerInfo, defaults: dict[str, Any]) -> Manifest:
    """With key/value state that the attention operator writes in place."""
    checkpoint = work.checkpoint
    source = work.source(tokenizer.file, IMPLEMENTATION)
    work.stages.begin("trace")
    layers = _explain(checkpoint, lambda: probe_layers(source.module))
    rule: LengthRule | None = _explain(checkpoint, lambda: length_rule(source.module))
    context = _context_length(checkpoint, work.options.max_length, rule.stretch if rule else 1.0)
    if rule is not None and context <= rule.edge:
        rule = None  # no sequence is long enough to have other factors than the original ones

    def make() -> dict[str, ir.Model]:
        traced = _explain(checkpoint, lambda: trace(source.module, layers, work.target.query_seqlens, rule is not None))
        work.stages.begin("rewrite")
        prefill, decode = both_graphs(traced, context)
        return {"prefill": prefill, "decode": decode}

    graphs, hashed = work.write(source, make)
    vocab = int(graphs["prefill"].graph.outputs[0].shape[2])
    return work.manifest(
        source,
        graphs,
        hashed,
        family="decoder",
        model=ModelInfo(
            context,
            vocab,
            _embedding_shape(source)[1],
            len(layers),
            source.num_parameters,
            rule.edge if rule is not None and rule.recomputes else None,
        ),
        state=_state(layers, work.dtype),
        tokenizer=tokenizer,
        generation=defaults,
    )


def _write_encoder(work: _Work) -> Manifest:
    """An encoder's package but its manifest, which is returned."""
    from llmx.export.encoder import build_module, describe_encoder, trace_encoder
    from llmx.export.passes import encoder_graph

    checkpoint = work.checkpoint
    loaded = load_tokenizer(checkpoint)
    tokenizer = write_tokenizer(checkpoint, loaded, work.folder)
    source = work.source(tokenizer.file, None)  # its masks are tensors: what transformers chooses
    work.stages.begin("trace")
    module = _explain(
        checkpoint, lambda: build_module(checkpoint, source.module, work.torch_dtype, work.options.pooling)
    )

    def make() -> dict[str, ir.Model]:
        traced = _explain(checkpoint, lambda: trace_encoder(module))
        work.stages.begin("rewrite")
        return {"encoder": encoder_graph(traced)}

    graphs, hashed = work.write(source, make)
    info = _explain(checkpoint, lambda: describe_encoder(checkpoint, module, graphs["encoder"], loaded))
    rows, width = _embedding_shape(source)
    names = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
    layers = next((v for name in names if (v := getattr(checkpoint.config, name, None))), 0)
    return work.manifest(
        source,
        graphs,
        hashed,
        family="encoder",
        model=ModelInfo(info.max_length, rows, width, int(layers), source.num_parameters),
        state=[],
        tokenizer=tokenizer,
        generation={},
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


def _context_length(checkpoint: Checkpoint, wanted: int | None, stretch: float, model: Any = None) -> int:
    """The wanted length, or the config's times what its rotary scaling stretches it by. Where the config names none and
    `model` is given and has no table of positions, nothing limits it (recurrences, ALiBi): `_UNLIMITED`.
    """
    config = checkpoint.config.get_text_config(decoder=True)
    known = next(
        (
            v
            for n in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions")
            if (v := getattr(config, n, None))
        ),
        None,
    )
    known = known and int(known * stretch)
    if known is None and wanted is None and model is not None:
        tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        if all(table is model.get_input_embeddings() for table in tables):
            return _UNLIMITED
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
    from llmx.runtime.backend import open_backend
    from llmx.runtime.encoder import open_encoder

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
        by_length = any(graph.input_named("rope_lengths") is not None for graph in manifest.graphs.values())
        result = verify(backend, checkpoint, options.adapter, manifest.dtype, windows, by_length, reporter.advance)
    finally:
        backend.close()
    return replace(manifest, verification=result)
