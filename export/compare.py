"""`llmx verify`: a written package against its PyTorch source, measured rather than merely passed.

The reference is what the export verifies against (`llmx.export.verify`): weights rounded to the package's dtype,
computed in float32, each row alone. The package runs as in production, through `LLM` and its backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from llmx.export.agreement import greedy_params, token_agreement
from llmx.export.checkpoint import Checkpoint, open_checkpoint
from llmx.export.compare_encoders import compare_encoder
from llmx.export.compare_seq2seq import compare_seq2seq
from llmx.export.dequantized import exact_copy, quantized_matrices, use_package_weights
from llmx.export.differences import Differences, Spot
from llmx.export.integer_check import check_prompts
from llmx.export.pair import LENGTHS, CompareOptions, Pair, Report, Stage
from llmx.export.perplexity import perplexity, text_ids, window_length
from llmx.export.rope import length_rule
from llmx.export.targets import cannot_verify
from llmx.export.verify import _LONGEST, _NEW_TOKENS, TOLERANCE, ReferencePath, _logits, reference_path
from llmx.export.weights import load_model
from llmx.runtime import LLM
from llmx.runtime.backend import recompute
from llmx.runtime.errors import CheckpointError, MachineError, RequestError, UnsupportedModelError, VerificationError
from llmx.runtime.hub import resolve_package
from llmx.runtime.manifest import Manifest, check_hashes, load_manifest

_SHORTEST, _SPREAD = 2, 97  # further prompts have 2 to 96 tokens


def compare(options: CompareOptions, stage: Stage = lambda _: None) -> Report:
    """Compare a package with its source. `stage` hears what begins.

    Raises PackageError, CheckpointError, RequestError, MachineError: what cannot be compared. A difference past the
    tolerance is no error but a report that did not pass.
    """
    folder = resolve_package(options.onnx)
    manifest = load_manifest(folder)
    if options.integrity:
        stage("Hashing the package")
        check_hashes(folder, manifest)
    if options.text is not None and manifest.family == "encoder":
        raise RequestError(
            f"Perplexity is for models that generate, and {options.onnx} is an encoder; leave --text-file out."
        )
    if manifest.dtype == "bfloat16":
        raise MachineError(
            f"{options.onnx} is bfloat16, which the CPU provider cannot run; compare an fp32 or fp16 export."
        )
    reason = cannot_verify(manifest)
    if reason is not None:
        raise MachineError(f"{options.onnx} cannot be compared on this machine: {reason}.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    checkpoint = _checkpoint(options, manifest)
    stage("Loading PyTorch's model")
    model = load_model(checkpoint, getattr(torch, manifest.dtype), options.adapter)
    _check_same(options, manifest, model)
    kinds = {"encoder": compare_encoder, "encoder-decoder": compare_seq2seq}
    pair = Pair(folder, manifest, checkpoint, model.float(), options)
    compare_family = kinds.get(manifest.family, _compare_decoder)
    with torch.no_grad():
        if manifest.quantization is not None:
            return _compare_quantized(pair, compare_family, stage)
        return compare_family(pair, stage)


def _compare_quantized(pair: Pair, compare_family: Callable[[Pair, Stage], Report], stage: Stage) -> Report:
    """What quantization costs beside the source, and whether the graph equals PyTorch with the package's own weights: the
    one is reported, the other decides.
    """
    report = compare_family(replace(pair, options=replace(pair.options, tolerance=math.inf)), stage)
    report.tolerance = pair.tolerance
    stage("Reading the quantized weights")
    try:
        use_package_weights(pair.model, quantized_matrices(pair.folder, pair.manifest))
    except VerificationError as error:
        pair.fail(report, str(error))
        return report
    with exact_copy(pair.folder, pair.manifest) as (folder, manifest):
        exact = replace(pair, folder=folder, manifest=manifest, options=replace(pair.options, text=None))
        checked = compare_family(exact, stage)
    report.graph = checked.outputs
    report.passed, report.reason = checked.passed, checked.reason
    report.layer, report.parting = checked.layer, checked.parting
    if checked.passed and "append" in pair.manifest.graphs:
        stage("Comparing prompts with PyTorch")
        try:
            check_prompts(pair.folder, pair.manifest, pair.model)
        except VerificationError as error:
            pair.fail(report, str(error))
    return report


def _checkpoint(options: CompareOptions, manifest: Manifest) -> Checkpoint:
    task = manifest.encoder.task if manifest.encoder is not None else "generate"
    try:
        checkpoint = open_checkpoint(options.model, options.revision, options.trust_remote_code, task)
    except UnsupportedModelError:
        raise CheckpointError(
            f"{options.model} is no model for {task}, which {options.onnx} was exported for; give its own source."
        ) from None
    made, given = manifest.source.get("model_type"), checkpoint.config.model_type
    if made is not None and made != given:
        raise CheckpointError(
            f"{options.onnx} was exported from a model of type {made}, and {options.model} is a {given}; give its own source."
        )
    return checkpoint


def _check_same(options: CompareOptions, manifest: Manifest, model: Any) -> None:
    """Raises CheckpointError where the checkpoint is of other sizes than the package's source was."""
    rows, width = model.get_input_embeddings().weight.shape
    # a decoder's vocabulary is its logits', which may be fewer than the embeddings
    head = model.get_output_embeddings() if manifest.family != "encoder" else None
    vocab = rows if head is None or not hasattr(head, "weight") else head.weight.shape[0]
    sizes = [
        ("architecture", manifest.source.get("architecture"), type(model).__name__),
        ("hidden size", manifest.model.hidden_size, int(width)),
        ("vocabulary", manifest.model.vocab_size, int(vocab)),
        ("parameters", manifest.model.parameters, sum(p.numel() for p in model.parameters())),
    ]
    for what, made, given in sizes:
        if made is not None and made != given:
            raise CheckpointError(
                f"{options.onnx} was exported from another model: its {what} is {made}, and that of {options.model} is "
                f"{given}; give the checkpoint that it was exported from."
            )


def _compare_decoder(pair: Pair, stage: Stage) -> Report:
    options, manifest = pair.options, pair.manifest
    by_length = any(graph.input_named("rope_lengths") is not None for graph in manifest.graphs.values())
    rule = length_rule(pair.model) if by_length else None
    lengths = _lengths(pair, rule.edge if rule else None)
    window = window_length(manifest.model.context_length) if options.text is not None else 2
    room = min(manifest.model.context_length, max(window, *lengths) + _NEW_TOKENS)
    stage("Loading the package")
    with LLM(pair.folder, device="cpu", max_length=room, slots=len(lengths), threads=options.threads) as llm:
        text = text_ids(llm, options.text, options.tokens) if options.text is not None else None
        stage("Running PyTorch")
        steps = min(_NEW_TOKENS, room - max(lengths))
        paths = [
            reference_path(pair.model, n, 1000 * options.seed + row, steps, stepwise=rule is not None)
            for row, n in enumerate(lengths)
        ]
        stage("Running the package")
        differences = Differences(pair.tolerance)
        _teacher_forced(llm.backend, paths, steps, differences)
        generation = _generate(llm, paths, steps, min(pair.tolerance, TOLERANCE[manifest.dtype]))
        measured = None
        if text is not None:
            stage("Perplexity")
            measured = perplexity(llm, pair.model, text, differences)
        chunk = llm.prefill_chunk if llm.backend.chunked else llm.max_length
    report = pair.report(differences, generation=generation, perplexity=measured)
    if differences.first is not None:
        stage("Looking for the layer")
        tokens = _tokens_of(differences.first, paths, text, window, chunk)
        stepwise = "prefill" not in manifest.graphs or differences.first.phase == "decode"
        graph = "decode" if stepwise else "prefill"
        pair.part(report, differences.first, graph, tokens, lambda: _logits(pair.model, torch.from_numpy(tokens)[None]))
    elif not generation["within_tolerance"]:
        pair.fail(
            report, "Logits agree, and greedy tokens differ by more than a tie: the runtime, not the graph, is wrong."
        )
    return report


def _lengths(pair: Pair, edge: int | None) -> list[int]:
    """`prompts` ragged lengths, as many as wanted of: past every window, past the `edge` where rotary factors change, past
    the blocks of recurrences; then shorter ones.
    """
    manifest, count = pair.manifest, pair.options.prompts
    windows = {t.window for t in manifest.state if t.window is not None}
    named = getattr(pair.model.config.get_text_config(decoder=True), "sliding_window", None)
    windows |= {named} if isinstance(named, int) else set()  # a hint: carried state knows of no window
    edges = windows | ({edge} if edge is not None else set())
    crossing = [n + 9 for n in sorted(edges, reverse=True) if n + 9 <= _LONGEST]
    approaching = [max(1, edge - 7)] if edge is not None and edge <= _LONGEST else []  # crossed while decoding
    wanted = list(dict.fromkeys([*crossing, *approaching, *reversed(LENGTHS)]))
    random = np.random.default_rng(pair.options.seed)
    wanted += random.integers(_SHORTEST, _SPREAD, max(0, count - len(wanted))).tolist()
    longest = manifest.model.context_length - _NEW_TOKENS
    return [min(n, max(1, longest)) for n in wanted[:count]]


def _teacher_forced(backend: Any, paths: list[ReferencePath], steps: int, differences: Differences) -> None:
    """Prompts into one slot each, in two chunks where the package takes them; then PyTorch's tokens, all rows in a batch."""
    for row, path in enumerate(paths):
        split = max(1, path.prompt_length * 2 // 3) if backend.chunked else path.prompt_length
        for start, end in ((0, split), (split, path.prompt_length)):
            if start < end:
                got = backend.prefill(row, path.tokens[start:end], start, np.arange(end - start), path.rope_length)
                differences.add(got, path.logits[start:end], row, start, "prefill")
    for step in range(steps):
        at = np.array([path.prompt_length + step for path in paths])
        for row, path in enumerate(paths):
            if at[row] == backend.recompute_at:
                recompute(backend, row, path.tokens[: at[row]], int(at[row]))
        got = backend.decode(np.array([path.tokens[n] for path, n in zip(paths, at, strict=True)]), at).rows()
        for row, path in enumerate(paths):
            differences.add(got[row : row + 1], path.logits[at[row] : at[row] + 1], row, int(at[row]), "decode")


def _generate(llm: LLM, paths: list[ReferencePath], steps: int, tolerance: float) -> dict[str, Any]:
    """Free-running greedy tokens of all rows in a ragged batch, beside transformers'."""
    prompts = [path.tokens[: path.prompt_length].tolist() for path in paths]
    got = [out.outputs[0].token_ids for out in llm.generate(prompts, greedy_params(steps))]
    lengths = [path.prompt_length for path in paths]
    wanted = [path.tokens[path.prompt_length :] for path in paths]
    chosen = [path.logits[path.prompt_length - 1 : -1] for path in paths]
    return token_agreement(wanted, chosen, got, lengths, tolerance)


def _tokens_of(spot: Spot, paths: list[ReferencePath], text: np.ndarray | None, window: int, chunk: int) -> np.ndarray:
    """The tokens that lead to `spot`, its own included."""
    if spot.phase != "text":
        return paths[spot.row].tokens[: spot.position + 1]
    assert text is not None
    start = spot.row * max(1, window // 2)
    return text[start : start + spot.position - start + 1]
