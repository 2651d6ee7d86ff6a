"""`export_model`: load, trace, rewrite, write, verify."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from llmx.export.checkpoint import Checkpoint, open_checkpoint
from llmx.export.dequantized import StoredMatrix, exact_copy, quantized_matrices, use_package_weights
from llmx.export.encoder import verify_encoder
from llmx.export.families import write_decoder, write_encoder, write_seq2seq
from llmx.export.integer_check import check_prompts
from llmx.export.package import package_folder, write_manifest
from llmx.export.quality import decoder_quality, read_ids, written_by
from llmx.export.targets import TARGETS, Target, cannot_verify
from llmx.export.verify import verify
from llmx.export.verify_seq2seq import verify_seq2seq
from llmx.export.weights import load_model
from llmx.export.work import ExportOptions, ExportResult, Reporter, Stages, Work
from llmx.runtime.backend import open_backend
from llmx.runtime.encoder import open_encoder
from llmx.runtime.errors import ExportError
from llmx.runtime.manifest import Manifest, Verification

_LONGEST = 2048  # positions of state that a comparison takes
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_model(options: ExportOptions, reporter: Reporter | None = None) -> ExportResult:
    """Export a causal language model or an encoder to a package and verify it against PyTorch.

    Raises CheckpointError, UnsupportedModelError, VerificationError or ExportError; in each case nothing is left at the
    output.
    """
    stages = Stages(reporter or Reporter())
    warnings: list[str] = []
    stages.begin("load")
    target = _target(options.target)
    checkpoint = open_checkpoint(options.model, options.revision, options.trust_remote_code, options.task)
    if options.pooling is not None and checkpoint.task != "embed":
        raise ExportError(
            f"--pooling goes with embedding models, and this is exported for {checkpoint.task}; leave it out."
        )
    if options.with_hidden_states and checkpoint.task != "generate":
        raise ExportError("--with-hidden-states goes with decoder-only models; embedding models have them anyway.")
    if options.max_length is not None and checkpoint.task not in ("generate", "seq2seq", "transcribe"):
        raise ExportError("--max-length goes with models that generate; an encoder takes what it was trained for.")
    output = options.output or Path("artifacts") / checkpoint.short_name
    dtype = _dtype(options, target, checkpoint)
    with package_folder(output, options.force) as folder, torch.no_grad():
        writers = {"generate": write_decoder, "seq2seq": write_seq2seq, "transcribe": write_seq2seq}
        write = writers.get(checkpoint.task, write_encoder)
        manifest = write(Work(folder, checkpoint, options, target, dtype, stages, warnings))
        stages.begin("verify")
        manifest = _verified(manifest, folder, checkpoint, options, stages.reporter)
        if manifest.verification.status == "skipped" and options.verify:
            warnings.append(f"The package was not verified: {manifest.verification.reason}.")
        write_manifest(folder, manifest)
    stages.end()
    return ExportResult(output, manifest, stages.seconds, warnings)


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
    if target.default_dtype is None and own in DTYPES.values() and not (target.on_device and own == "float32"):
        return own
    return target.default_dtype or "float16"  # attention has no float32 kernel on a device


def _verified(
    manifest: Manifest, folder: Path, checkpoint: Checkpoint, options: ExportOptions, reporter: Reporter
) -> Manifest:
    """The manifest with what the comparison with PyTorch found."""
    reason = "--no-verify was given" if not options.verify else cannot_verify(manifest)
    if reason is not None:
        return replace(manifest, verification=Verification("skipped", reason=reason))

    def load() -> Any:
        return load_model(checkpoint, getattr(torch, manifest.dtype), options.adapter).float()

    if manifest.quantization is None:
        return _compared(manifest, folder, checkpoint, options, load, reporter)

    matrices = quantized_matrices(folder, manifest)

    def load_rounded() -> Any:
        model = load()
        use_package_weights(model, matrices)
        return model

    with exact_copy(folder, manifest) as (exact_folder, exact):
        checked = _compared(exact, exact_folder, checkpoint, options, load_rounded, reporter)
    if "append" in manifest.graphs:
        check_prompts(folder, manifest, load_rounded())
    manifest = replace(checked, files=manifest.files)
    if manifest.family == "decoder":
        file = options.quantize.quality_file if options.quantize else None
        quality = _quality(manifest, folder, load(), matrices, file)
        manifest = replace(manifest, quantization={**(manifest.quantization or {}), "quality": quality})
    return manifest


def _compared(
    manifest: Manifest,
    folder: Path,
    checkpoint: Checkpoint,
    options: ExportOptions,
    load: Callable[[], Any],
    reporter: Reporter,
) -> Manifest:
    """The package in `folder` against the float32 model that `load` returns."""
    if manifest.encoder is not None:
        encoder = open_encoder(folder, manifest, device="cpu", mapped_cache=False)
        checked, pads = verify_encoder(
            encoder.run, load, checkpoint, manifest.dtype, options.pooling, manifest.encoder.max_length
        )
        return replace(manifest, verification=checked, encoder=replace(manifest.encoder, padding=pads))
    longest = min(manifest.model.context_length, _LONGEST)
    backend = open_backend(folder, manifest, device="cpu", max_length=longest, slots=4, mapped_cache=False)
    try:
        if manifest.seq2seq is not None:
            result = verify_seq2seq(backend, load, manifest.seq2seq, manifest.dtype, reporter.advance)
        else:
            windows = sorted({t.window for t in manifest.state if t.window is not None})
            by_length = any(graph.input_named("rope_lengths") is not None for graph in manifest.graphs.values())
            stepwise = "prefill" not in manifest.graphs
            shortest = manifest.model.min_prefill
            result = verify(backend, load, manifest.dtype, windows, by_length, reporter.advance, stepwise, shortest)
    finally:
        backend.close()
    return replace(manifest, verification=result)


def _quality(
    manifest: Manifest, folder: Path, model: Any, matrices: dict[str, StoredMatrix], file: Path | None
) -> dict[str, Any]:
    """What quantization costs a decoder (llmx.export.quality), and on which text. `model`, the source in float32, is left with the
    package's `matrices`.
    """
    longest = min(manifest.model.context_length, _LONGEST)
    texts = written_by(model, longest) if file is None else [read_ids(folder, manifest, file)]
    measured, append = {"": manifest}, manifest.graphs.get("append")
    if append is not None:
        # what decoding computes, and apart from it what prompts do, whose products are others
        same = {name: graph for name, graph in manifest.graphs.items() if name != "append"} | {"prefill": append}
        measured = {"": replace(manifest, graphs=same), "prompts": manifest}
    with ExitStack() as stack:
        backends = [
            stack.enter_context(closing(open_backend(folder, each, "cpu", longest, mapped_cache=False)))
            for each in measured.values()
        ]
        found = dict(zip(measured, decoder_quality(backends, model, matrices, texts), strict=True))
    return {"text": "written by the model" if file is None else file.name, **found.pop(""), **found}
