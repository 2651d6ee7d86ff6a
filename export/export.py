"""`export_model`: load, trace, rewrite, write, verify."""

from __future__ import annotations

from pathlib import Path

import torch
from llmx.export.checkpoint import Checkpoint, open_checkpoint
from llmx.export.families import write_decoder, write_encoder, write_seq2seq
from llmx.export.package import package_folder, write_manifest
from llmx.export.targets import TARGETS, Target
from llmx.export.verify import verify
from llmx.export.work import ExportOptions, ExportResult, Reporter, Stages, Work
from llmx.runtime.errors import ExportError
from llmx.runtime.manifest import Manifest, Verification

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
    return own if target.default_dtype is None and own in DTYPES.values() else target.default_dtype or "float16"


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
    if manifest.seq2seq is not None:
        from llmx.export.seq2seq import verify_seq2seq
        from llmx.export.weights import load_model

        longest = min(manifest.model.context_length, 2048)
        backend = open_backend(folder, manifest, device="cpu", max_length=longest, slots=4, mapped_cache=False)
        dtype = getattr(torch, manifest.dtype)
        result = verify_seq2seq(
            backend,
            lambda: load_model(checkpoint, dtype, options.adapter),
            manifest.seq2seq,
            manifest.dtype,
            reporter.advance,
        )
        return replace(manifest, verification=result)
    windows = sorted({t.window for t in manifest.state if t.window is not None})
    longest = min(manifest.model.context_length, 2048)
    backend = open_backend(folder, manifest, device="cpu", max_length=longest, slots=4, mapped_cache=False)
    try:
        by_length = any(graph.input_named("rope_lengths") is not None for graph in manifest.graphs.values())
        result = verify(backend, checkpoint, options.adapter, manifest.dtype, windows, by_length, reporter.advance)
    finally:
        backend.close()
    return replace(manifest, verification=result)
