"""A package against PyTorch: the same tokens through both, logits compared position by position.

The reference is PyTorch's greedy path, each prompt alone; the package follows it teacher-forced, its prompts together
in one batch, prefilled in chunks. Weights are rounded to the package's dtype first and then computed in float32, so
that the tolerance covers the graph's arithmetic alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmx.export.checkpoint import Checkpoint
from llmx.export.lowering import quiet
from llmx.export.weights import load_model
from llmx.runtime.backend import Backend
from llmx.runtime.errors import VerificationError
from llmx.runtime.manifest import Verification

#: Largest logit difference, as a part of the largest reference logit (or of 1, whichever is more).
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
_NEW_TOKENS = 16
_PROMPT_LENGTHS = (5, 23, 61)
_LONGEST = 1100  # a window longer than this is not crossed: the reference would cost more than the export

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReferencePath:
    """One prompt and PyTorch's greedy continuation. `logits` float32 [len(tokens), vocab], at every position."""

    prompt_length: int
    tokens: np.ndarray  # int64 [prompt_length + _NEW_TOKENS]
    logits: np.ndarray


def verify(
    backend: Backend,
    checkpoint: Checkpoint,
    adapter: Path | None,
    dtype: str,
    windows: list[int],
    progress: Progress,
) -> Verification:
    """Compare `backend`'s package with the checkpoint in PyTorch.

    Raises VerificationError at the first position where logits differ by more than the tolerance, or where the best
    tokens differ though PyTorch's two best lie further apart than twice the tolerance.
    """
    model = load_model(checkpoint, getattr(torch, dtype), adapter).float()
    lengths = _prompt_lengths(windows, backend.max_length)
    paths = []
    for index, length in enumerate(lengths):
        paths.append(reference_path(model, length, seed=index))
        progress(index + 1, 2 * len(lengths))
    del model
    worst, positions, tolerance = 0.0, 0, 0.0
    comparisons = [_compare_prefill(backend, row, path, dtype) for row, path in enumerate(paths)]
    progress(2 * len(lengths) - 1, 2 * len(lengths))
    comparisons.append(_compare_decode(backend, paths, dtype))
    progress(2 * len(lengths), 2 * len(lengths))
    for difference, count, allowed in comparisons:
        if difference >= worst:
            worst, tolerance = difference, allowed
        positions += count
    return Verification("passed", max_abs_diff=worst, tolerance=tolerance, positions=positions)


def _prompt_lengths(windows: list[int], max_length: int) -> list[int]:
    lengths = list(_PROMPT_LENGTHS)
    crossed = [w + 9 for w in windows if w + 9 > max(lengths) and w + 9 <= _LONGEST]
    lengths += crossed[:1]
    return [length for length in lengths if length + _NEW_TOKENS <= max_length] or [max(1, max_length - _NEW_TOKENS)]


def reference_path(model: Any, length: int, seed: int, new_tokens: int = _NEW_TOKENS) -> ReferencePath:
    """A random prompt of `length` tokens, continued greedily by PyTorch, with the logits of every position."""
    vocab = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(seed))
    tokens = greedy(model, prompt, new_tokens)
    with torch.no_grad():
        # generate's positions: some models would count others themselves
        takes = "position_ids" in inspect.signature(model.forward).parameters
        positions = {"position_ids": torch.arange(tokens.shape[1])[None]} if takes else {}
        logits = model(input_ids=tokens, use_cache=False, **positions).logits[0].float().numpy()
    _check_reference(tokens[0].numpy(), logits, length)
    return ReferencePath(length, tokens[0].numpy(), logits)


def _check_reference(tokens: np.ndarray, logits: np.ndarray, length: int) -> None:
    """Raises VerificationError where the model with its cache goes another way than without: there is no truth to equal."""
    for position in range(length, len(tokens)):
        row = logits[position - 1]
        lead = float(row.max() - row[tokens[position]])
        if lead > 2 * TOLERANCE["float32"] * max(1.0, float(np.abs(row).max())):
            raise VerificationError(
                f"PyTorch disagrees with itself at position {position}: with its cache it chooses token {tokens[position]}, "
                f"without {int(row.argmax())} (by {lead:.3g}); report it to transformers."
            )


def greedy(model: Any, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """transformers' greedy `generate` for exactly `new_tokens` tokens: [1, length] -> [1, length + new_tokens]."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)
    with torch.no_grad(), quiet():
        original, model.generation_config = model.generation_config, config
        try:
            tokens: torch.Tensor = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=config
            )
        finally:
            model.generation_config = original
    return tokens


Comparison = tuple[float, int, float]  # largest difference, positions compared, tolerance


def _compare_prefill(backend: Backend, slot: int, path: ReferencePath, dtype: str) -> Comparison:
    """Prefill `path`'s prompt into `slot` in two chunks, asking for the logits of every position."""
    worst, tolerance = 0.0, 0.0
    split = max(1, path.prompt_length * 2 // 3)
    for start, end in ((0, split), (split, path.prompt_length)):
        if start < end:
            logits = backend.prefill(slot, path.tokens[start:end], start, np.arange(end - start))
            difference, tolerance = check_logits(
                logits, path.logits[start:end], dtype, f"row {slot}, prefill position", start
            )
            worst = max(worst, difference)
    return worst, path.prompt_length, tolerance


def _compare_decode(backend: Backend, paths: list[ReferencePath], dtype: str) -> Comparison:
    """All rows in one batch, one token a step, fed PyTorch's tokens."""
    worst, tolerance = 0.0, 0.0
    for step in range(_NEW_TOKENS):
        lengths = [path.prompt_length + step for path in paths]
        tokens = np.array([path.tokens[length] for path, length in zip(paths, lengths, strict=True)])
        logits = backend.decode(tokens, np.array(lengths))
        for row, (path, length) in enumerate(zip(paths, lengths, strict=True)):
            place = f"row {row}, decode position"
            difference, allowed = check_logits(
                logits[row : row + 1], path.logits[length : length + 1], dtype, place, length
            )
            worst, tolerance = max(worst, difference), max(tolerance, allowed)
    return worst, _NEW_TOKENS * len(paths), tolerance


def check_logits(got: np.ndarray, want: np.ndarray, dtype: str, place: str, first: int) -> tuple[float, float]:
    """(largest difference, tolerance) of logits [n, vocab]; raises VerificationError past it."""
    got = got.astype(np.float32)[:, : want.shape[1]]
    tolerance = TOLERANCE[dtype] * max(1.0, float(np.abs(want).max()))
    difference = np.abs(got - want).max(axis=1)
    chosen, best = got.argmax(axis=1), want.argmax(axis=1)
    top_two = np.partition(want, -2, axis=1)[:, -2:]
    clear = top_two[:, 1] - top_two[:, 0] > 2 * tolerance
    wrong = ~(difference <= tolerance) | ((chosen != best) & clear)  # `not <=` so that NaN is wrong
    if wrong.any():
        at = int(np.argmax(wrong))
        raise VerificationError(
            f"ONNX and PyTorch disagree at {place} {first + at}: logits differ by {difference[at]:.3g} (tolerance "
            f"{tolerance:.3g}); the best token is {best[at]} in PyTorch ({want[at, best[at]]:.4f}) and {chosen[at]} in "
            f"ONNX ({got[at, chosen[at]]:.4f})."
        )
    return float(difference.max()), tolerance
