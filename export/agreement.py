"""How far a package's free-running greedy tokens are transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llmx.runtime import SamplingParams


def greedy_params(tokens: int) -> SamplingParams:
    """Plain greedy decoding of so many tokens, whatever a package's defaults are (beams, penalties)."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True).resolved({})


def token_agreement(
    wanted: Sequence[np.ndarray],
    logits: Sequence[np.ndarray],
    got: Sequence[Sequence[int]],
    lengths: list[int],
    tolerance: float,
) -> dict[str, Any]:
    """Each row's tokens `got` beside the `wanted` int64 [tokens], which PyTorch chose by its `logits` [tokens, vocab].

    After its first other token a row follows its own text, so agreement counts the tokens before it. A first difference
    is a tie where the two tokens' logits lie closer than twice the tolerance. `lengths` of the prompts are passed on.
    """
    agreed, identical, first, within = 0, 0, None, True
    for row, (want, have) in enumerate(zip(wanted, got, strict=True)):
        other = np.flatnonzero(np.array(have) != want)
        agreed += int(other[0]) if len(other) else len(want)
        identical += not len(other)
        if not len(other):
            continue
        at = int(other[0])
        lead = float(logits[row][at][want[at]] - logits[row][at][have[at]])
        tie = lead <= 2 * tolerance * max(1.0, float(np.abs(logits[row][at]).max()))
        within = within and tie
        if first is None or (first["tie"] and not tie):
            first = {"row": row, "token": at, "pytorch": int(want[at]), "onnx": int(have[at]), "lead": lead, "tie": tie}
    return {
        "prompt_lengths": lengths,
        "tokens_per_row": max(map(len, wanted), default=0),
        "identical_rows": identical,
        "agreement": agreed / max(1, sum(map(len, wanted))),
        "first_difference": first,
        "within_tolerance": within,
    }
