"""Perplexity of a package and of PyTorch on the same text.

The text's first tokens are read in windows of at most 512 tokens (fewer where the context is shorter), each starting
half a window after the one before and computed from an empty state. A window scores the tokens that no earlier window
scored, so every token but the text's first counts once, and from the second window on with half a window of context at
least. Perplexity is exp of the mean negative log-probability. Both sides read the same windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from llmx.export.differences import Differences, log_softmax
from llmx.export.verify import _logits
from llmx.runtime.errors import RequestError

_WINDOW = 512


def text_ids(llm: Any, text: str, limit: int) -> np.ndarray:
    """The first `limit` tokens of `text`, int64 [n], as the package's tokenizer writes them. Raises RequestError."""
    ids = llm.tokenizer.encode(text)[:limit]
    if len(ids) < 2:
        raise RequestError(f"The text has {len(ids)} token(s), and perplexity needs at least 2; give a longer text.")
    return np.array(ids, np.int64)


def window_length(context: int) -> int:
    """Tokens of a window in a context of `context` positions."""
    return min(_WINDOW, context)


def windows(count: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored token, end) of the windows over `count` tokens."""
    stride, scored, start = max(1, length // 2), 1, 0
    while scored < count:
        end = min(start + length, count)
        yield start, scored, end
        scored, start = end, start + stride


def perplexity(llm: Any, model: Any, ids: np.ndarray, differences: Differences) -> dict[str, Any]:
    """Both perplexities on `ids` int64 [n]; the logits compared are added to `differences`."""
    length = window_length(llm.max_length)
    chunk = llm.prefill_chunk if llm.backend.chunked else length
    onnx = pytorch = 0.0
    for index, (start, scored, end) in enumerate(windows(len(ids), length)):
        piece = ids[start:end]
        reference = _logits(model, torch.from_numpy(piece)[None])
        for begin in range(0, len(piece), chunk):
            part = piece[begin : begin + chunk]
            # every column that predicts a token of the text not scored before
            asked = np.arange(max(0, scored - 1 - start - begin), min(len(part), len(piece) - 1 - begin))
            got = llm.backend.prefill(0, part, begin, asked, len(piece)).astype(np.float32)
            if not len(asked):
                continue
            want, targets = reference[begin + asked], piece[begin + asked + 1]
            differences.add(got, want, index, start + begin + int(asked[0]), "text")
            onnx -= _chosen(got, targets)
            pytorch -= _chosen(want, targets)
    count = len(ids) - 1
    return {
        "pytorch": math.exp(pytorch / count),
        "onnx": math.exp(onnx / count),
        "tokens": count,
        "window": length,
        "stride": max(1, length // 2),
    }


def _chosen(logits: np.ndarray, targets: np.ndarray) -> float:
    return float(np.take_along_axis(log_softmax(logits), targets[:, None], axis=1).sum())
