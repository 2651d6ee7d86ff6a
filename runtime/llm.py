"""`LLM`: a package, ready to generate."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from llmx.runtime.ahead import Ahead
from llmx.runtime.backend import Backend, open_backend
from llmx.runtime.driver import Driver, PieceStream
from llmx.runtime.errors import ContextLengthError, FamilyError, LlmxError, RequestError
from llmx.runtime.hub import resolve_package
from llmx.runtime.llm_chat import ChatMethods
from llmx.runtime.llm_encoder import EncoderMethods
from llmx.runtime.llm_scoring import ScoringMethods
from llmx.runtime.manifest import Manifest, load_manifest
from llmx.runtime.outputs import CompletionOutput, RequestOutput, StreamPiece
from llmx.runtime.params import SamplingParams
from llmx.runtime.prompts import Prompt, as_list
from llmx.runtime.scheduler import Request
from llmx.runtime.tokenizer import Tokenizer
from llmx.runtime.tracing import active, span

if TYPE_CHECKING:
    from llmx.runtime.encoder import Encoder
    from llmx.runtime.speculation import Speculation
    from llmx.runtime.speculator import Speculator
    from llmx.runtime.transcribe import Transcript


class LLM(EncoderMethods, ScoringMethods, ChatMethods):
    """A model package loaded for generation: numpy, onnxruntime and tokenizers, no PyTorch.

    Threads: every method may be called from several threads at once; their requests share the steps and the batch
    (continuous batching), results are not mixed. Whoever waits for tokens drives the engine: there is no thread of its
    own, so an idle LLM uses no CPU, and Ctrl-C reaches the caller between two steps.

    Forks: onnxruntime's threads do not survive a fork. Create the LLM in the process that uses it (after gunicorn or
    multiprocessing forked); in a child of its creator every call raises ClosedError.

    Args:
        model: a package folder, or the hub id of a published package.
        device: "auto", "cpu", "cuda" or "cuda:N". "auto" is CUDA where onnxruntime has it, a GPU is there and the package
            was exported with --target cuda.
        max_length: positions (prompt and output) a request may take; None: what the model's context and half of the
            free memory allow, at most 4,096.
        slots: requests that run at the same time; more wait their turn.
        threads: CPU threads; None: the CPUs that the process may use.
        spin: let worker threads busy-wait between operators of a step (faster; False for shared machines).
        prefill_chunk: prompt tokens run at once; longer prompts take several steps, between which others decode.
            None: 192 on a CPU (128 where prompts multiply integers), 2,048 on a GPU.
        prefix_cache_bytes: memory for the state of prompt prefixes, which later prompts that begin alike are spared
            (docs/serving.md); 0: none. Packages with carried state have none.
        kv_cache_memory_bytes: memory for the state of all slots together, where that is less than a whole context each: the
            youngest requests wait while the older ones need it, and go on later (docs/serving.md). None: no bound but
            `max_length` and `slots`. On a GPU it bounds `max_length`.
        mapped_cache: keep prepacked CPU weights in a cache on disk, mapped into memory and shared by the graphs.
        speculative: speculative decoding, lossless: a draft package with the same vocabulary (folder or hub id), or a
            `Speculation`, which also looks up what followed in the prompt. docs/decoding.md.

    Raises PackageError, FamilyError, ProviderError, MissingDependencyError, OutOfMemoryError, RequestError.
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "auto",
        *,
        revision: str | None = None,
        max_length: int | None = None,
        slots: int = 8,
        threads: int | None = None,
        spin: bool = True,
        prefill_chunk: int | None = None,
        mapped_cache: bool = True,
        prefix_cache_bytes: int = 0,
        cache_dir: str | Path | None = None,
        speculative: Speculation | str | Path | None = None,
        kv_cache_memory_bytes: int | None = None,
    ) -> None:
        if prefill_chunk is not None and prefill_chunk < 1:
            raise RequestError(f"prefill_chunk must be at least 1, and is {prefill_chunk}.")
        folder = resolve_package(model, revision)
        manifest = load_manifest(folder)
        cache = Path(cache_dir) if cache_dir is not None else None
        self._driver = Driver()
        self.encoder: Encoder | None = None
        if manifest.family == "encoder":
            self.folder, self.manifest = folder, manifest
            from llmx.runtime.encoder import open_encoder

            self.encoder = open_encoder(folder, manifest, device, threads, spin, mapped_cache, cache)
            self.tokenizer = self.encoder.tokenizer
            if speculative is not None:
                self.need_generation()
            return
        if manifest.family not in ("decoder", "encoder-decoder"):
            raise FamilyError(f"{folder} is an {manifest.family} model, which this llmx does not run; upgrade llmx.")
        options: dict[str, Any] = {
            "device": device, "threads": threads, "spin": spin, "mapped_cache": mapped_cache, "cache_dir": cache,
        }  # fmt: skip
        # Opening graphs releases the interpreter's lock. A trace wants one thing after the other.
        ahead = Ahead(partial(_load_tokenizer, folder, manifest), inline=active() is not None)
        try:
            with span("load graphs"):
                backend = open_backend(
                    folder,
                    manifest,
                    max_length=max_length,
                    slots=slots,
                    kv_cache_memory_bytes=kv_cache_memory_bytes,
                    **options,
                )
        except BaseException:
            ahead.join()
            raise
        chunk = prefill_chunk or backend.prefill_chunk
        try:
            tokenizer = ahead.result()
            speculator = self._speculator(speculative, manifest, tokenizer, backend, chunk, options)
        except BaseException:
            backend.close()
            raise
        self._setup(folder, manifest, tokenizer, backend, chunk, prefix_cache_bytes, speculator)

    @staticmethod
    def _speculator(
        wanted: Speculation | str | Path | None,
        manifest: Manifest,
        tokenizer: Tokenizer,
        backend: Backend,
        chunk: int,
        options: dict[str, Any],
    ) -> Speculator | None:
        if wanted is None:
            return None
        with span("load draft"):
            from llmx.runtime.speculator import open_speculator

            return open_speculator(wanted, manifest, tokenizer, backend, chunk, **options)

    def _setup(
        self,
        folder: Path,
        manifest: Manifest,
        tokenizer: Tokenizer,
        backend: Backend,
        prefill_chunk: int,
        prefix_cache_bytes: int = 0,
        speculator: Speculator | None = None,
    ) -> None:
        from llmx.runtime.engine import Engine

        self.folder, self.manifest, self.tokenizer, self.backend = folder, manifest, tokenizer, backend
        self.prefill_chunk = prefill_chunk
        self.engine = self._driver.engine = Engine(
            backend, tokenizer, prefill_chunk, manifest.seq2seq, prefix_cache_bytes, speculator
        )
        if speculator is not None:
            with span("measure passes"):
                speculator.calibrate(self.engine)

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue one prompt or many; one RequestOutput each, in order.

        A prompt is text or a list of token ids (taken as they are). `params` is one SamplingParams for all, or one for
        each. Raises RequestError (ContextLengthError for a prompt too long) before anything runs, and what ends a request
        while it runs (rules that leave no token) when the others have ended; `generate_each` keeps these.
        """
        many = as_list(prompts)
        each = self._each_params(params, len(many))
        requests = self._submit([(prompt, p, None) for prompt, p in zip(many, each, strict=True)])
        try:
            return self._finished(requests)
        finally:
            self._abandon(requests)

    def generate_each(
        self, prompts: Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput | LlmxError]:
        """`generate` where a bad request is no matter of the others: in its place is the error, not raised."""
        requests: list[Request | LlmxError] = []
        running: list[Request] = []
        try:
            for prompt, own in zip(prompts, self._each_params(params, len(prompts)), strict=True):
                try:
                    running += self._submit([(prompt, own, None)])
                    requests.append(running[-1])
                except RequestError as error:
                    requests.append(error)
            self._driver.drive(lambda: all(r.finished for r in running))
            return [_output_or_error(request) for request in requests]
        finally:
            self._abandon(running)

    def _finished(self, requests: list[Request]) -> list[RequestOutput]:
        self._driver.drive(lambda: all(r.finished for r in requests))
        for request in requests:
            if request.error is not None:
                raise request.error
        return [output_of(request) for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> PieceStream:
        """Continue a prompt, yielding text as soon as it is certain. Closing (or dropping) the iterator frees the slot.

        Raises RequestError at the call, not at the first piece.
        """
        pieces: deque[StreamPiece] = deque()
        [request] = self._submit([(prompt, params or SamplingParams(), pieces.append)])
        return PieceStream(self._driver, request, pieces)

    def transcribe(
        self,
        audio: str | Path | np.ndarray,
        params: SamplingParams | None = None,
        *,
        sampling_rate: int | None = None,
        language: str | None = None,
        task: str = "transcribe",
    ) -> Transcript:
        """Text of speech: a WAV file, or float [samples] of mono sound at `sampling_rate` Hz (None: the model's).

        Sound longer than the encoder's window is cut into windows, transcribed by themselves in one batch. `language`
        ("en"; None: detected) and `task` ("transcribe", or "translate" into English) as the model knows them. Raises
        FamilyError, RequestError, MissingDependencyError (another sampling rate without soxr).
        """

        from llmx.runtime.transcribe import transcribe

        def generate(windows: list[np.ndarray], prompt: list[int], params: SamplingParams) -> list[RequestOutput]:
            resolved = params.resolved(self.manifest.generation)
            requests: list[Request] = []
            try:
                for window in windows:
                    requests.append(self.engine.add(None, prompt, resolved, None, window))  # noqa: PERF401 - abandoned below
                return self._finished(requests)
            finally:
                self._abandon(requests)

        self._driver.check_usable()
        self.need_generation()
        return transcribe(self, audio, sampling_rate, language, task, params or SamplingParams(), generate)

    def warmup(self) -> None:
        """Run every graph once, so that the first request meets warm code and touched memory."""
        if self.encoder is not None:
            ones = np.ones((1, min(16, self.max_length)), np.int64)
            self.encoder.run({"input_ids": ones, "attention_mask": ones, "token_type_ids": ones * 0})
            return
        with self._driver.at_rest():
            if self.manifest.seq2seq is not None:
                from llmx.runtime.audio import log_mel

                audio, longest = self.manifest.seq2seq.audio, self.manifest.seq2seq.max_source_length
                silence = log_mel(np.zeros(1, np.float32), audio) if audio is not None else None
                self.backend.encode(0, np.zeros(min(16, longest), np.int64) if silence is None else silence)
            count = min(self.prefill_chunk, self.max_length - 1)
            if self.backend.chunked:  # few tokens may take another graph
                self.backend.prefill(0, np.zeros(min(2, count), np.int64), 0, np.zeros(1, np.int64))
            self.backend.prefill(0, np.zeros(count, np.int64), 0, np.zeros(1, np.int64))
            self.backend.decode(np.zeros(1, np.int64), np.full(1, count))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _submit(
        self, wanted: Seq[tuple[Prompt, SamplingParams, Callable[[StreamPiece], None] | None]]
    ) -> list[Request]:
        self._driver.check_usable()
        self.need_generation()
        requests: list[Request] = []
        encoded = [self._encode(prompt) for prompt, _, _ in wanted]  # which takes a while, before the first may run
        try:
            for (prompt, params, emit), ids in zip(wanted, encoded, strict=True):
                resolved = params.resolved(self.manifest.generation)
                text = prompt if isinstance(prompt, str) else None
                if self.manifest.seq2seq is None:
                    requests.append(self.engine.add(text, ids, resolved, emit))
                else:
                    start = self.manifest.seq2seq.decoder_prompt
                    requests.append(self.engine.add(text, start, resolved, emit, np.array(self._source(ids), np.int64)))
        except BaseException:
            self._abandon(requests)
            raise
        self._driver.wake()
        return requests

    def _source(self, ids: list[int]) -> list[int]:
        """Checked ids for the encoder. Raises RequestError or ContextLengthError."""
        info = self.manifest.seq2seq
        assert info is not None
        if info.audio is not None:
            raise FamilyError(f"{self.folder} is a speech model; use `llmx run --audio FILE.wav` (LLM.transcribe).")
        if not ids:
            raise RequestError("The prompt is empty; give at least one token of text.")
        if min(ids) < 0 or max(ids) >= info.source_vocab_size:
            raise RequestError(f"Prompt token ids must lie between 0 and {info.source_vocab_size - 1}.")
        if len(ids) > info.max_source_length:
            raise ContextLengthError(
                f"The prompt has {len(ids)} tokens and the encoder reads {info.max_source_length}; shorten it."
            )
        return ids

    def _abandon(self, requests: list[Request]) -> None:
        for request in requests:
            if not request.finished:
                self.engine.cancel(request)

    def _each_params(self, params: SamplingParams | Seq[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * count
        if len(params) != count:
            raise RequestError(
                f"There are {count} prompts and {len(params)} SamplingParams; give one, or one for each."
            )
        return list(params)

    # -- lifetime -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free sessions and state, after the step in progress. Waiting callers get ClosedError. Idempotent."""
        self._driver.close(self._release if self.encoder is None else self.encoder.close)

    def _release(self) -> None:
        self.backend.close()
        self.engine.masks.close()
        if self.engine.speculator is not None:
            self.engine.speculator.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """`Tokenizer.load`; imports what the engine is made of meanwhile."""

    with span("load tokenizer"):
        return Tokenizer.load(folder, manifest.tokenizer)


def _prompt_ids(request: Request) -> list[int]:
    """The prompt's tokens as the caller knows them: an encoder-decoder's source, where that is text."""
    source = request.source
    ids: list[int] = source.tolist() if source is not None and source.ndim == 1 else request.prompt_ids
    return ids


def _output_or_error(request: Request | LlmxError) -> RequestOutput | LlmxError:
    """Raises what is no LlmxError: a fault of the program, not of the request."""
    if isinstance(request, LlmxError):
        return request
    if request.error is None:
        return output_of(request)
    if isinstance(request.error, LlmxError):
        return request.error
    raise request.error


def output_of(request: Request) -> RequestOutput:
    """What the caller of a finished request gets."""
    scored = request.params.logprobs is not None
    outputs = [
        CompletionOutput(
            s.index,
            s.text,
            s.output_ids,
            s.logprobs if scored else None,
            s.cumulative_logprob if s.params.logprobs is not None or request.beams is not None else None,
            s.finish_reason,
            s.stop_reason,
            score=s.score,
        )
        for s in request.sequences
    ]
    return RequestOutput(
        request.id,
        request.prompt,
        _prompt_ids(request),
        outputs,
        request.metrics,
        True,
        request.prompt_logprobs,
    )
