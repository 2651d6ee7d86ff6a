"""How fast a package generates: requests through the engine, as a caller's are, on random tokens.

One measurement has a prompt length, a batch and a depth. Every request of the batch arrives at once with `depth + prompt`
tokens; its clock starts when it arrives, or, at a depth, when its first `depth` positions are filled. Decoding is looked
at while the whole batch decodes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from llmx.bench.statistics import percentiles, spread
from llmx.bench.steps import steps
from llmx.bench.traffic import state_bytes, weight_bytes
from llmx.runtime import LLM, SamplingParams
from llmx.runtime.errors import FamilyError, RequestError
from llmx.runtime.hub import resolve_package
from llmx.runtime.manifest import load_manifest
from llmx.runtime.manifest_check import CARRIED
from llmx.runtime.scheduler import Request
from llmx.runtime.step_logits import StepLogits
from llmx.runtime.tracing import active


@dataclass(frozen=True)
class Point:
    """What is measured: tokens of the prompt, steps after the first token, requests at once, positions filled before."""

    prompt: int
    steps: int
    batch: int = 1
    depth: int = 0

    @property
    def positions(self) -> int:
        """Positions that a request of it takes."""
        return self.depth + self.prompt + self.steps + 1


@dataclass
class Run:
    """One repetition. Times in seconds."""

    first_token: list[float]  # of each request: time to first token
    prefill: float  # of all prompts together
    gaps: list[float] = field(default_factory=list)  # between a request's tokens, while the whole batch decodes
    decode: float = 0.0  # the time in which `decoded` tokens came, while the whole batch decodes
    decoded: int = 0
    step: list[float] = field(default_factory=list)  # steps that only decode, the whole batch
    host: list[float] = field(default_factory=list)  # their part outside onnxruntime's run call


def longest(points: Sequence[Point], chunk: int) -> int:
    """Positions a slot needs: early requests of a batch decode while the later ones are prefilled."""
    return max(p.positions + (p.batch - 1) * -(-(p.depth + p.prompt) // chunk) for p in points)


_SMALL_CHUNK = 64  # no engine prefills in smaller pieces by itself


def random_ids(rng: np.random.Generator, vocab: int, count: int) -> list[int]:
    return [int(token) for token in rng.integers(0, vocab, count)]


def run_once(llm: LLM, point: Point, rng: np.random.Generator) -> Run:
    """Measure `point` once. The active trace, where there is one, must see the package's sessions."""
    batch = _Batch(llm, point, rng)
    batch.run()
    return batch.result()


class _Depth:
    """A backend that cuts each prompt at `depth`, and notes when a slot has got there and what came after it took."""

    def __init__(self, backend: Any, depth: int) -> None:
        self._backend, self._depth = backend, depth
        self.reached: list[float] = []  # in the order of the prompts
        self.seconds = 0.0  # in prefill calls past the depth

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def prefill(
        self, slot: int, token_ids: np.ndarray, start: int, positions: np.ndarray, prompt_length: int | None = None
    ) -> np.ndarray:
        before, logits = self._fill(slot, token_ids, start, prompt_length)
        if before < len(token_ids):
            begin = time.perf_counter()
            logits = self._backend.prefill(slot, token_ids[before:], start + before, positions - before, prompt_length)
            self.seconds += time.perf_counter() - begin
        return logits

    def prefill_last(
        self,
        slot: int,
        token_ids: np.ndarray,
        start: int,
        prompt_length: int | None = None,
        temperature: float = -1.0,
    ) -> StepLogits:
        before, _ = self._fill(slot, token_ids, start, prompt_length)  # a prompt goes on past the depth
        begin = time.perf_counter()
        last: StepLogits = self._backend.prefill_last(
            slot, token_ids[before:], start + before, prompt_length, temperature
        )
        self.seconds += time.perf_counter() - begin
        return last

    def _fill(self, slot: int, token_ids: np.ndarray, start: int, prompt_length: int | None) -> tuple[int, np.ndarray]:
        """Run those of the tokens that lie before the depth; how many they are, and what that returned."""
        before = min(max(self._depth - start, 0), len(token_ids))
        logits = np.zeros((0, self._backend.vocab_size), np.float32)
        if before:
            logits = self._backend.prefill(slot, token_ids[:before], start, np.zeros(0, np.int64), prompt_length)
        if start < self._depth <= start + before:
            self.reached.append(time.perf_counter())
        return before, logits


class _Batch:
    """The requests of one repetition, driven step by step."""

    def __init__(self, llm: LLM, point: Point, rng: np.random.Generator) -> None:
        self.llm, self.point = llm, point
        self.marks: Any = _Depth(llm.backend, point.depth) if point.depth and llm.backend.chunked else llm.backend
        chunk = llm.engine.scheduler.prefill_chunk
        self.tokens: list[list[tuple[float, int]]] = [[] for _ in range(point.batch)]  # when, and in which step
        self.ends: list[float] = []  # of the steps
        self.starts: list[float] = []
        self.requests: list[Request] = []
        seq2seq = llm.manifest.seq2seq
        for index in range(point.batch):
            ids, source = self._input(rng) if seq2seq is not None else (self._prompt(rng), None)
            chunks = -(-len(ids) // chunk)  # of each later request, beside which this one decodes
            most = min(point.steps + 1 + chunks * (point.batch - 1 - index), llm.max_length - len(ids))
            params = SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True)
            resolved = params.resolved(llm.manifest.generation)
            self.starts.append(time.perf_counter())
            self.requests.append(llm.engine.add(None, ids, resolved, self._note(index), source))

    def _prompt(self, rng: np.random.Generator) -> list[int]:
        return random_ids(rng, self.llm.manifest.model.vocab_size, self.point.depth + self.point.prompt)

    def _input(self, rng: np.random.Generator) -> tuple[list[int], np.ndarray]:
        """An encoder-decoder's own prompt, and a source of the point's prompt length (speech: one window of noise)."""
        seq2seq = self.llm.manifest.seq2seq
        assert seq2seq is not None
        if seq2seq.audio is None:
            return seq2seq.decoder_prompt, rng.integers(0, seq2seq.source_vocab_size, self.point.prompt)
        audio = seq2seq.audio
        frames = audio.chunk_seconds * audio.sampling_rate // audio.hop_length
        return seq2seq.decoder_prompt, rng.standard_normal((audio.n_mels, frames), np.float32)

    def _note(self, index: int) -> Any:
        def emit(piece: Any) -> None:
            self.tokens[index] += [(time.perf_counter(), len(self.ends))] * len(piece.token_ids)

        return emit

    def run(self) -> None:
        engine = self.llm.engine
        engine.backend = self.marks
        try:
            while not all(len(tokens) > self.point.steps for tokens in self.tokens):
                engine.step()
                self.ends.append(time.perf_counter())
                for request in self.requests:
                    if request.error is not None:
                        raise request.error
                if all(request.finished for request in self.requests):
                    break
        finally:
            engine.backend = self.llm.backend
            for request in self.requests:
                engine.cancel(request)
            engine.step()

    def result(self) -> Run:
        arrived = [tokens[0][0] for tokens in self.tokens]
        if isinstance(self.marks, _Depth):  # prompts are prefilled in order
            starts, prefill = self.marks.reached, self.marks.seconds
        else:
            starts, prefill = self.starts, max(arrived) - self.starts[0]
        run = Run([first - start for first, start in zip(arrived, starts, strict=True)], prefill)
        begin = max(tokens[0][1] for tokens in self.tokens)  # the whole batch decodes in the steps after this one …
        end = min(tokens[-1][1] for tokens in self.tokens)  # … up to this one
        if end <= begin:
            return run
        for tokens in self.tokens:
            run.gaps += [b - a for (a, _), (b, step) in pairwise(tokens) if begin < step <= end]
        run.decoded = sum(begin < step <= end for tokens in self.tokens for _, step in tokens)
        run.decode = self.ends[end] - self.ends[begin]
        trace = active()
        if trace is not None:
            found = [s for s in steps(trace) if self.ends[begin] <= s.start < self.ends[end]]
            run.step, run.host = [s.seconds for s in found], [s.host for s in found]
        return run


def check(llm: LLM, points: Sequence[Point]) -> None:
    """Raises RequestError where the package cannot run one of `points`."""
    seq2seq, encoder = llm.manifest.seq2seq, llm.encoder
    for point in points:
        if encoder is not None and point.prompt > encoder.info.max_length:
            raise RequestError(f"--n-prompt {point.prompt}: the encoder takes {encoder.info.max_length} tokens.")
        if seq2seq is not None and point.depth:
            raise RequestError("An encoder-decoder's output has no context before it; leave out --n-depth.")
        if seq2seq is not None and seq2seq.audio is None and point.prompt > seq2seq.max_source_length:
            raise RequestError(f"--n-prompt {point.prompt}: the encoder reads {seq2seq.max_source_length} tokens.")


def measure(llm: LLM, point: Point, repetitions: int, warmup: int, seed: int) -> dict[str, Any]:
    """Statistics of `repetitions` runs of `point`, after `warmup` ones that do not count."""
    rng = np.random.default_rng([seed, point.prompt, point.batch, point.depth])
    for _ in range(warmup):
        run_once(llm, point, rng)
    trace = active()
    runs = []
    for _ in range(repetitions):
        if trace is not None:
            trace.spans.clear()
        runs.append(run_once(llm, point, rng))
    return summary(llm, point, runs)


def summary(llm: LLM, point: Point, runs: list[Run]) -> dict[str, Any]:
    """Medians, ranges and percentiles of the runs, in seconds and tokens a second."""
    prompt = _source(llm, point) or point.prompt
    prompts = (prompt if llm.backend.chunked or llm.manifest.seq2seq else point.depth + prompt) * point.batch
    facts: dict[str, Any] = {"prompt": prompt, "steps": point.steps, "batch": point.batch, "depth": point.depth}
    facts["ttft_s"] = spread([float(np.mean(run.first_token)) for run in runs])
    facts["prefill_tokens_per_s"] = spread([prompts / run.prefill for run in runs])
    decoding = [run for run in runs if run.decoded]
    facts["tpot_s"] = spread([run.decode * point.batch / run.decoded for run in decoding])
    facts["decode_tokens_per_s"] = spread([run.decoded / run.decode for run in decoding])
    facts["itl_s"] = percentiles([gap for run in runs for gap in run.gaps])
    hosts = [run for run in runs if run.step]
    facts["host_s"] = spread([float(np.median(run.host)) for run in hosts])
    facts["host_share"] = spread([sum(run.host) / sum(run.step) for run in hosts])
    facts["bytes_per_step"] = step_bytes(llm, point) if decoding else 0
    return facts


def _source(llm: LLM, point: Point) -> int:
    """Positions of an encoder-decoder's source: the prompt's tokens, or those of one window of sound; 0 for a decoder."""
    seq2seq = llm.manifest.seq2seq
    if seq2seq is None:
        return 0
    return point.prompt if seq2seq.audio is None else seq2seq.max_source_length


def step_bytes(llm: LLM, point: Point) -> int:
    """Bytes that a decode step in the middle of the run reads: the weights once, the state of every row."""
    source, seq2seq = _source(llm, point), llm.manifest.seq2seq
    length = (point.depth + point.prompt if seq2seq is None else len(seq2seq.decoder_prompt)) + point.steps // 2
    alone = any(tensor.layout in CARRIED for tensor in llm.manifest.state)  # each row runs by itself
    weights = weight_bytes(llm.folder, llm.manifest) * (point.batch if alone else 1)
    return weights + point.batch * state_bytes(llm.manifest, length, source)


def texts_per_second(llm: LLM, tokens: int, batch: int, repetitions: int, warmup: int, seed: int) -> dict[str, Any]:
    """An encoder's speed on `batch` random texts of `tokens` tokens, `batch` at once."""
    encoder = llm.encoder
    if encoder is None:
        raise FamilyError(f"{llm.folder} generates text.")
    rng = np.random.default_rng([seed, tokens, batch])
    seconds = []
    for round_number in range(warmup + repetitions):
        ids = rng.integers(0, llm.manifest.model.vocab_size, (batch, tokens))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        start = time.perf_counter()
        encoder.run(feeds)
        if round_number >= warmup:
            seconds.append(time.perf_counter() - start)
    facts: dict[str, Any] = {"prompt": tokens, "batch": batch}
    facts["seconds"] = spread(seconds)
    facts["texts_per_s"] = spread([batch / s for s in seconds])
    facts["tokens_per_s"] = spread([batch * tokens / s for s in seconds])
    return facts


def open_for(package: str, points: Sequence[Point], revision: str | None = None, **options: Any) -> LLM:
    """The package with slots and positions for every one of `points`. Raises RequestError where its context is too short."""
    manifest = load_manifest(resolve_package(package, revision))
    if manifest.family == "encoder":
        return LLM(package, revision=revision, **options)
    context, needed = manifest.model.context_length, max(point.positions for point in points)
    if manifest.seq2seq is not None:
        needed = max(len(manifest.seq2seq.decoder_prompt) + point.steps + 1 for point in points)
    if needed > context:
        raise RequestError(
            f"The package's context holds {context} positions, and depth, prompt and output take {needed}; ask for less."
        )
    slots = max(point.batch for point in points)
    positions = min(context, max(needed, longest(points, _SMALL_CHUNK), 2))
    return LLM(package, revision=revision, max_length=positions, slots=slots, **options)
