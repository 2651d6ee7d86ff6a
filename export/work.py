"""One export's settings, progress and what it has made so far: what the families of models share."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from llmx.export.checkpoint import Checkpoint
from llmx.export.experts import use_operator
from llmx.export.lowering import uncollected
from llmx.export.package import (
    WEIGHTS_FILE,
    check_free_space,
    describe_graph,
    describe_weights,
    hash_files,
    write_graphs,
)
from llmx.export.quantization import (
    Plan,
    QuantizationOptions,
    QuantizedWeight,
    describe_quantization,
    num_values,
    plan_quantization,
    second_form,
)
from llmx.export.quantized_graph import integer_prompts, quantize_graphs
from llmx.export.targets import Target
from llmx.export.tokenizer import TOKENIZER_FILE, generation_defaults, load_tokenizer, write_tokenizer
from llmx.export.weights import SourceModel, build_source, load_model, static_experts
from llmx.export.writer import WeightsWriter
from llmx.runtime.errors import ExportError, UnsupportedModelError
from llmx.runtime.manifest import FileInfo, Manifest, TokenizerInfo, Verification

_UNLIMITED = 1 << 20  # positions of a model that nothing limits


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how. `dtype` and `max_length` of None mean the target's default and the model's context.

    `quantize_prompts` ("int8" | "same" | "auto"): whether prompts multiply with a second, int8 form of quantized layers
    (llmx.export.integer_products).
    """

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
    with_hidden_states: bool = False
    pooling: str | None = None
    quantize: QuantizationOptions | None = None
    quantize_prompts: str = "auto"


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


class Stages:
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
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.perf_counter() - self._start
            self._name = ""


@dataclass
class Work:
    """One export's settings and what it has made so far, for the two kinds of package."""

    folder: Path
    checkpoint: Checkpoint
    options: ExportOptions
    target: Target
    dtype: str
    stages: Stages
    warnings: list[str]
    quantized: list[QuantizedWeight] = field(default_factory=list)  # what the written graphs read so
    integer_prompts: bool = False  # whether prompts multiply with a second form of those

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def source(self, tokenizer_file: str, attention: str | None) -> SourceModel:
        """The model to trace with this attention implementation, its vocabulary checked against the tokenizer's."""
        source = build_source(self.checkpoint, self.torch_dtype, self.options.adapter, attention)
        _check_vocabulary(source, self.folder, tokenizer_file)
        if not self.target.on_device and self.torch_dtype == torch.float32:  # the provider's only kernel
            use_operator(source)
        return source

    def plain_source(self, tokenizer_file: str) -> SourceModel:
        """The model to trace as plain ONNX: with transformers' eager attention function where the model calls it through
        their interface, else with the code that it runs by default (Falcon's own eager code adds ALiBi twice).
        """
        source = self.source(tokenizer_file, None)
        _use_eager(source.module)
        return source

    def loaded(self, prepare: Callable[[torch.nn.Module], None]) -> SourceModel:
        """As `plain_source`, with its values in memory, as `prepare` leaves them."""
        if self.checkpoint.packed is not None:
            raise UnsupportedModelError(
                "its first call changes its weights, and this checkpoint's are quantized; export the original one"
            )
        module = load_model(self.checkpoint, self.torch_dtype, self.options.adapter)
        static_experts(module)
        _use_eager(module)
        prepare(module)
        return SourceModel(module, {})

    def shortened(self, found: int, wanted: int, what: str) -> int:
        """`found`, the length that the graphs are right for, with a warning where it is less than the model's."""
        if found < wanted:
            self.warnings.append(
                f"The model's code takes another way for {what} of more than {found} tokens, and a graph has no branches; the "
                f"package takes {found}, not {wanted}."
            )
        return found

    def write(
        self, source: SourceModel, make: Callable[[], dict[str, ir.Model]]
    ) -> tuple[dict[str, ir.Model], dict[str, FileInfo]]:
        """`make` the graphs by name while the weights are written; the graphs, and what is known of the weights' file."""
        plan = self._plan(source)
        with WeightsWriter(self.folder / WEIGHTS_FILE, source, plan) as writer, uncollected():
            second = self._second_form(source, plan)
            check_free_space(self.folder, int(writer.expected_bytes * 1.02))
            graphs = make()
            if plan:
                self.quantized = quantize_graphs(graphs, source, plan, self.target.accuracy_level)
            self.integer_prompts = bool(second) and integer_prompts(graphs, second)
            if self.integer_prompts:
                check_free_space(
                    self.folder, int((writer.bytes_to_come + sum(map(num_values, second.values()))) * 1.02)
                )
            elif self.options.quantize_prompts == "int8":
                self.warnings.append(
                    "--quantize-prompts int8 changes nothing here: it goes with linear layers in 4 or 8 bits, target cpu, fp32, "
                    "and key/value state that is written in place."
                )
            self.stages.begin("write")
            files = {graph_file(name): graph for name, graph in graphs.items()}
            write_graphs(self.folder, files, writer, source, self.stages.reporter.advance)
        return graphs, {WEIGHTS_FILE: FileInfo(writer.size, writer.sha256)}

    def _second_form(self, source: SourceModel, plan: Plan) -> Plan:
        """The matrices that prompts get in int8 as well: on the provider whose products of integers are the faster ones."""
        if self.target.on_device or self.torch_dtype != torch.float32:
            return {}
        return second_form(plan, self.options.quantize_prompts, source)

    def _plan(self, source: SourceModel) -> Plan:
        """What is written quantized, calibrated where that is asked for."""
        quantize = self.options.quantize
        plan = plan_quantization(source, quantize)
        if quantize is None or quantize.method != "gptq":
            return plan
        if self.checkpoint.packed is not None:
            raise ExportError(
                "--quantize-method gptq needs the original weights, and this checkpoint is quantized already."
            )
        from llmx.export.gptq import calibrated
        from llmx.export.quality import calibration_ids

        self.stages.begin("calibrate")
        model = load_model(self.checkpoint, self.torch_dtype, self.options.adapter).float()
        ids = calibration_ids(model, self.checkpoint, quantize.calibration_file)
        plan, missed = calibrated(model, plan, ids, self.stages.reporter.advance)
        self.stages.begin("trace")
        if missed:
            self.warnings.append(
                f"The calibration text reaches {len(missed)} of the matrices not ({missed[0]} …); they are rounded to nearest."
            )
        return plan

    def manifest(
        self, source: SourceModel, graphs: dict[str, ir.Model], hashed: dict[str, FileInfo], **parts: Any
    ) -> Manifest:
        """The manifest of `parts` with what every family has, not verified yet."""
        state = {name for tensor in parts["state"] for name in (tensor.input, tensor.output)}
        return Manifest(
            name=self.checkpoint.short_name,
            target=self.target.name,
            dtype=self.dtype,
            graphs={name: describe_graph(graph_file(name), graph, state) for name, graph in graphs.items()},
            source=_source_info(self.checkpoint, self.options, source),
            created_by=_versions(),
            verification=Verification("skipped", reason="not verified yet"),
            files=hash_files(self.folder, hashed),
            min_onnxruntime=self.target.min_onnxruntime,
            quantization=self._quantization(source),
            weights=describe_weights(graphs) if self.target.on_device else [],
            **parts,
        )

    def _quantization(self, source: SourceModel) -> dict[str, Any] | None:
        found = describe_quantization(self.quantized, source, self.options.quantize, self.checkpoint.packed)
        return found and found | {"prompts": "int8" if self.integer_prompts else "same"}


def _use_eager(module: Any) -> None:
    if module._can_set_attn_implementation():
        module.set_attn_implementation("eager")


def graph_file(name: str) -> str:
    return f"{name}.onnx"


def text_side(work: Work) -> tuple[TokenizerInfo, dict[str, Any]]:
    """The tokenizer, written, and the generation defaults."""
    checkpoint = work.checkpoint
    tokenizer = write_tokenizer(checkpoint, load_tokenizer(checkpoint), work.folder)
    defaults, ignored = generation_defaults(checkpoint)
    if ignored:
        work.warnings.append(
            f"generation_config sets {', '.join(ignored)}, which llmx does not apply; "
            "output may differ from transformers' default."
        )
    return tokenizer, defaults


def context_length(checkpoint: Checkpoint, wanted: int | None, stretch: float, unlimited: bool = False) -> int:
    """The wanted length, or the config's times what its rotary scaling stretches it by; where it names none, `_UNLIMITED` for
    a model that nothing limits.
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
    if known is None and wanted is None and unlimited:
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
    if tokenizer_file == TOKENIZER_FILE:
        from tokenizers import Tokenizer

        tokens = Tokenizer.from_file(str(folder / tokenizer_file)).get_vocab(with_added_tokens=True)
    else:
        tokens = json.loads((folder / tokenizer_file).read_text(encoding="utf-8"))["vocab"]
    rows = embedding_shape(source)[0]
    highest = max(tokens.values(), default=0)
    if highest >= rows:
        raise ExportError(
            f"The tokenizer has token id {highest} and the model only {rows} embeddings; they do not belong together."
        )


def explain(checkpoint: Checkpoint, work: Callable[[], Any]) -> Any:
    """Run `work`, prefixing whatever it finds unsupported with the architecture's name."""
    try:
        return work()
    except UnsupportedModelError as error:
        architecture = (getattr(checkpoint.config, "architectures", None) or [checkpoint.config.model_type])[0]
        raise UnsupportedModelError(f"{architecture} cannot be exported: {error}") from error.__cause__


def embedding_shape(source: SourceModel) -> tuple[int, int]:
    """(rows, width) of the input embedding. Raises UnsupportedModelError where it is no plain table."""
    table = getattr(source.module.get_input_embeddings(), "weight", None)
    if not isinstance(table, torch.Tensor) or table.ndim != 2:
        raise UnsupportedModelError(
            f"{type(source.module).__name__} cannot be exported: it has no table of token embeddings"
        )
    return int(table.shape[0]), int(table.shape[1])


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
