"""`best_of`: more outputs are drawn than returned, the most likely ones are kept."""

from __future__ import annotations

from dataclasses import replace

from llmx.runtime.outputs import StreamPiece
from llmx.runtime.params import SamplingParams
from llmx.runtime.scheduler import Request


def scored(params: SamplingParams) -> SamplingParams:
    """What the outputs are drawn with: their log-probabilities are needed, whether or not they are asked for."""
    return params if params.logprobs is not None else replace(params, logprobs=0)


def decide(request: Request) -> list[StreamPiece]:
    """Keep the `n` outputs of the largest summed log-probability, the best first (of equals the one drawn first), each
    as one piece: what was not chosen is never shown.
    """
    order = sorted(request.sequences, key=lambda s: -s.cumulative_logprob)
    request.sequences = order[: request.params.n]
    pieces = []
    for index, s in enumerate(request.sequences):
        s.index = index
        if request.params.logprobs is None:
            s.logprobs = []
        last = index == request.params.n - 1
        metrics = request.metrics if last else None
        pieces.append(
            StreamPiece(s.text, s.output_ids, index, s.finish_reason, s.stop_reason, s.logprobs or None, metrics)
        )
    request.undecided = False
    return pieces
