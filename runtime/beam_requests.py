"""Beam search as a request of the engine: its group, its steps, its outputs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from llmx.runtime.beams import BeamGroup, BeamSearch
from llmx.runtime.errors import LlmxError, RequestError
from llmx.runtime.history import History
from llmx.runtime.kv_budget import KVRoom
from llmx.runtime.params import SamplingParams
from llmx.runtime.processors import processed
from llmx.runtime.sampling import with_logprobs
from llmx.runtime.scheduler import Request, Sequence
from llmx.runtime.stopping import StopChecker

if TYPE_CHECKING:
    from llmx.runtime.step_output import OutputStage


def check_slots(params: SamplingParams, slots: int) -> None:
    """Raises RequestError where a search has more beams than there are slots."""
    if (params.num_beams or 1) > slots:
        raise RequestError(
            f"num_beams is {params.num_beams} and there are {slots} slots, one for each beam; "
            f"lower num_beams or load the model with slots={params.num_beams}."
        )


def check_room(params: SamplingParams, room: KVRoom | None, longest: int) -> None:
    """Raises RequestError where a search whose beams grow to `longest` positions would not fit even alone."""
    beams = params.num_beams or 1
    if room is not None and not room.ever_holds(beams, longest):
        raise RequestError(
            f"{beams} beams of up to {longest} tokens each do not fit into the {room.budget.positions} positions that "
            "kv_cache_memory_bytes has room for; lower num_beams or max_tokens, or raise it."
        )


def make_group(stage: OutputStage, request: Request) -> BeamGroup:
    """The search of a request whose sequences are its beams."""
    params, info = request.params, stage.tokenizer.info
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(info.eos_token_ids))
    room = stage.backend.max_length - len(request.prompt_ids)
    text_source = request.source is not None and request.source.ndim == 1

    def stopped(tokens: list[int]) -> bool:
        if time.perf_counter() >= request.deadline:  # then all beams end, as with transformers' max_time
            return True
        return bool(params.stop_strings) and _spell(stage, request, tokens)[1].matched is not None

    search = BeamSearch(
        params.num_beams or 1,
        1.0 if params.length_penalty is None else params.length_penalty,
        params.early_stopping or False,
        min(params.max_tokens or room, room),
        ends,
        len(request.prompt_ids) - 1 if text_source else 0,
        stopped if params.stop_strings or params.max_time is not None else None,
    )
    return BeamGroup(search, request.sequences)


def advance(stage: OutputStage, request: Request, rows: list[np.ndarray]) -> None:
    """One step of a search by its beams' logits [vocab], in the order of `beams` (the first step: the prompt's alone).

    What fails here is of this request alone, and ends it alone.
    """
    try:
        _step(stage, request, rows)
    except Exception as error:
        stage.fail(request, error)


def _step(stage: OutputStage, request: Request, rows: list[np.ndarray]) -> None:
    group: BeamGroup = request.beams
    params = request.params
    scores = np.stack([_scores(row, params, beam.history) for row, beam in zip(rows, group.beams, strict=False)])

    def note(parent: int, token: int) -> Any:
        row = np.ascontiguousarray(rows[min(parent, len(rows) - 1)], np.float32)
        return stage.entry(with_logprobs(row, token, params.logprobs or 0))

    request.metrics.first_token = request.metrics.first_token or time.perf_counter()
    group.step(scores, stage.backend.copy_slot, None if params.logprobs is None else note)
    if group.search.done:
        _finish(stage, request)


def _scores(row: np.ndarray, params: SamplingParams, history: History) -> np.ndarray:
    """Log-probabilities float32 [vocab] with the request's rules applied to them, as transformers does (and does not
    normalise again).
    """
    row = np.ascontiguousarray(row, np.float32)
    shifted = row - row.max()
    log_probs = shifted - np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    if not np.isfinite(log_probs.max()):
        raise LlmxError("The model returned NaN or infinite logits; export it with a wider dtype (bf16 or fp32).")
    rules = history.rules
    if rules.forced_last is not None and history.num_output + 1 >= (params.max_tokens or 0):
        only = np.full_like(log_probs, -np.inf)
        only[rules.forced_last] = 0.0
        return only
    log_probs = processed(log_probs, params, history)
    if rules.allowed is not None:
        only = np.full_like(log_probs, -np.inf)
        only[rules.allowed] = log_probs[rules.allowed]
        return only
    return log_probs


def _spell(stage: OutputStage, request: Request, tokens: list[int]) -> tuple[str, StopChecker]:
    """The text of an output, cut where a stop string ends it."""
    from llmx.runtime.detokenizer import IncrementalDetokenizer

    params, group = request.params, request.beams
    context = request.prompt_ids if request.source is None else []
    detokenizer = IncrementalDetokenizer(
        stage.tokenizer, context, params.skip_special_tokens, params.keep_special_tokens
    )
    stop = StopChecker(params.stop_strings, params.include_stop_str_in_output)
    text = ""
    for index, token in enumerate(tokens):
        if token in group.search.ends:
            break
        piece = detokenizer.push(token)
        text += piece if index < (params.min_tokens or 0) else stop.push(piece)
    text += stop.push(detokenizer.finish())
    return text + stop.finish(), stop


def _finish(stage: OutputStage, request: Request) -> None:
    """The best outputs take the place of the beams."""
    best = request.beams.search.best(request.params.n)
    if not best:
        stage.fail(request, RequestError("No token is left to choose for any beam: loosen the request's rules."))
        return
    for sequence in request.sequences:
        stage.scheduler.drop(sequence)
    request.sequences = request.sequences[: len(best)]
    for index, (sequence, output) in enumerate(zip(request.sequences, best, strict=True)):
        _conclude(stage, request, sequence, index, output)


def _conclude(stage: OutputStage, request: Request, sequence: Sequence, index: int, output: Any) -> None:
    text, stop = _spell(stage, request, output.tokens)
    ended = output.tokens[-1]
    sequence.index = index
    sequence.history = History(request.prompt_ids, sequence.history.rules)
    for token in output.tokens:
        sequence.history.append(token)
    sequence.cumulative_logprob, sequence.score = output.total, output.score
    sequence.logprobs = output.history if request.params.logprobs is not None else []
    sequence.finish_reason = "stop" if stop.matched is not None or ended in request.beams.search.ends else "length"
    sequence.stop_reason = stop.matched or (ended if ended in request.params.stop_token_ids else None)
    if sequence.finish_reason == "length" and len(output.tokens) < request.beams.search.max_tokens:
        sequence.stop_reason = "max_time"
    metrics = request.metrics
    metrics.num_output_tokens += len(output.tokens)
    metrics.last_token = time.perf_counter()
    if request.finished:
        metrics.finished = metrics.last_token
    stage.emit(sequence, text, list(output.tokens), sequence.logprobs or None)
