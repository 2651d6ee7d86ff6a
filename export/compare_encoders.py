"""Encoders beside PyTorch."""

from __future__ import annotations

import numpy as np
import torch
from llmx.export.checkpoint import Checkpoint
from llmx.export.differences import Differences
from llmx.export.encoder import EncoderModule, build_module, read_head, takes_token_types
from llmx.export.pair import LENGTHS, Pair, Report, Stage
from llmx.runtime import LLM


def compare_encoder(pair: Pair, stage: Stage) -> Report:
    """Rows alone in PyTorch, in one right-padded batch of the package (one by one where padding shows in its rows)."""
    info = pair.manifest.encoder
    assert info is not None
    module = build_module(pair.checkpoint, pair.model, torch.float32, _pooling(pair.checkpoint, info.pooling))
    lengths = (list(reversed(LENGTHS)) * pair.options.prompts)[: pair.options.prompts]
    rows = _rows(pair, [min(n, info.max_length) for n in lengths])
    stage("Loading the package")
    compared = "embeddings" if info.task == "embed" else "logits"
    differences = Differences(pair.tolerance, logits=False)
    with LLM(pair.folder, device="cpu", threads=pair.options.threads) as llm:
        stage("Comparing")
        got = _encoded(llm, rows, compared, info.padding)
    for index, (row, output) in enumerate(zip(rows, got, strict=True)):
        want = _reference(module, row, compared)
        got_rows = output[: len(want)] if output.ndim == 2 else output[None]
        differences.add(got_rows, want, index, 0, "token" if output.ndim == 2 else "output")
    report = pair.report(differences, compared)
    if differences.first is not None:
        stage("Looking for the layer")
        tokens = rows[differences.first.row]
        pair.part(report, differences.first, "encoder", tokens, lambda: _reference(module, tokens, compared))
    return report


def _rows(pair: Pair, lengths: list[int]) -> list[np.ndarray]:
    """Random token ids int64 [n], none of them the padding's."""
    vocab = pair.model.get_input_embeddings().weight.shape[0]
    pad = getattr(pair.checkpoint.config, "pad_token_id", None)
    random = np.random.default_rng(pair.options.seed)
    rows = [random.integers(0, vocab, length) for length in lengths]
    return [np.where(row == pad, (row + 1) % vocab, row) for row in rows]


def _pooling(checkpoint: Checkpoint, modes: list[str]) -> str | None:
    """The pooling that was asked for at export, or None where the checkpoint's own files say it."""
    if checkpoint.task != "embed" or read_head(checkpoint.path, torch.float32).pooling.modes == modes:
        return None
    return modes[0]


def _inputs(names: set[str], tokens: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray]:
    """int64 [rows, seq] inputs for right-padded `tokens` [rows, seq]."""
    mask = (np.arange(tokens.shape[1])[None] < np.array(lengths)[:, None]).astype(np.int64)
    every = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}
    return {name: array for name, array in every.items() if name in names}


def _encoded(llm: LLM, rows: list[np.ndarray], output: str, padding: bool) -> list[np.ndarray]:
    """The package's `output` of each row, [seq, width] or [width], as wide as its batch."""
    assert llm.encoder is not None
    names = {t.name for t in llm.manifest.graphs["encoder"].inputs}
    results = []
    for batch in [rows] if padding else [[row] for row in rows]:
        ids = np.full((len(batch), max(map(len, batch))), llm.manifest.tokenizer.pad_token_id or 0, np.int64)
        for index, row in enumerate(batch):
            ids[index, : len(row)] = row
        results += list(llm.encoder.run(_inputs(names, ids, [len(row) for row in batch]), [output])[output])
    return results


def _reference(module: EncoderModule, row: np.ndarray, output: str) -> np.ndarray:
    """PyTorch's `output` of one row alone, float32 [seq, width] or [1, width]."""
    names = {"input_ids", "attention_mask"} | ({"token_type_ids"} if takes_token_types(module.model) else set())
    inputs = _inputs(names, row[None], [len(row)])
    value = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})[output]
    result: np.ndarray = value.reshape(-1, value.shape[-1]).float().numpy()
    return result
