"""`LLM`: a package, ready to generate."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from llmx.runtime.audio import log_mel
from llmx.runtime.backend import Backend, open_backend, score_tokens
from llmx.runtime.conversation import ChatRequest, Conversations
from llmx.runtime.driver import Driver, PieceStream
from llmx.runtime.encoder import COMMANDS, Encoder, Filled, Label, Ranked, Text, TokenLabel, open_encoder
from llmx.runtime.engine import Engine
from llmx.runtime.errors import ContextLengthError, FamilyError, RequestError
from llmx.runtime.hub import resolve_package
from llmx.runtime.manifest import Manifest, load_manifest
from llmx.runtime.outputs import CompletionOutput, RequestOutput, StreamPiece
from llmx.runtime.params import SamplingParams
from llmx.runtime.perplexity import Perplexity, sliding
from llmx.runtime.prompts import Prompt, as_list, is_token
from llmx.runtime.scheduler import Request
from llmx.runtime.session import Session
from llmx.runtime.speculation import Speculation
from llmx.runtime.speculator import Speculator, open_speculator
from llmx.runtime.tokenizer import Tokenizer
from llmx.runtime.tracing import span
from llmx.runtime.transcribe import Transcript, transcribe


class LLM:
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
            None: 192 on a CPU, 2,048 on a GPU.
        prefix_cache_bytes: memory for the state of prompt prefixes, which later prompts that begin alike are spared
            (docs/serving.md); 0: none. Packages with carried state have none.
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
            self.encoder = open_encoder(folder, manifest, device, threads, spin, mapped_cache, cache)
            self.tokenizer = self.encoder.tokenizer
            if speculative is not None:
                self.need_generation()
            return
        if manifest.family not in ("decoder", "encoder-decoder"):
            raise FamilyError(f"{folder} is an {manifest.family} model, which this llmx does not run; upgrade llmx.")
        with span("load tokenizer"):
            tokenizer = Tokenizer.load(folder, manifest.tokenizer)
        with span("load graphs"):
            options: dict[str, Any] = {
                "device": device, "threads": threads, "spin": spin, "mapped_cache": mapped_cache, "cache_dir": cache,
            }  # fmt: skip
            backend = open_backend(folder, manifest, max_length=max_length, slots=slots, **options)
        chunk = prefill_chunk or backend.prefill_chunk
        try:
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
        self.folder, self.manifest, self.tokenizer, self.backend = folder, manifest, tokenizer, backend
        self.prefill_chunk = prefill_chunk
        self.engine = self._driver.engine = Engine(
            backend, tokenizer, prefill_chunk, manifest.seq2seq, prefix_cache_bytes, speculator
        )
        self._conversations = Conversations(folder, tokenizer)

    @property
    def max_length(self) -> int:
        """Positions that a request may take, prompt and output together."""
        return self.backend.max_length if self.encoder is None else self.encoder.info.max_length

    # -- encoders -----------------------------------------------------------------------------------------------------

    def embed(self, texts: str | Seq[Text | Seq[int]], **options: Any) -> np.ndarray:
        """Embeddings float32 [n, dimension] of texts (or lists of token ids); options as `Encoder.embed`'s:
        `dimensions`, `normalize`, `prompt_name`, `truncate`, `batch_size`. Raises FamilyError for another package.
        """
        return self._encoder("embed").embed([texts] if isinstance(texts, str) else texts, **options)

    def hidden_states(self, texts: str | Seq[Text | Seq[int]], **options: Any) -> list[np.ndarray]:
        """The final hidden states of each text, float32 [tokens, hidden]: an embedding model's, or, of a decoder exported
        with `--with-hidden-states`, what its output head reads. Raises FamilyError for another package.
        """
        if self.encoder is None and not options:
            return self._decoder_states([texts] if isinstance(texts, str) else texts)
        return self._encoder("embed").hidden_states([texts] if isinstance(texts, str) else texts, **options)

    def _decoder_states(self, texts: Seq[Any]) -> list[np.ndarray]:
        outputs = [t.role for graph in self.manifest.graphs.values() for t in graph.outputs]
        if "last_hidden_state" not in outputs:
            raise FamilyError(f"{self.folder} returns no hidden states; export it again with --with-hidden-states.")
        states = []
        for text in texts:
            ids = self._encode(text)
            self.engine.check_ids(ids)
            if len(ids) > self.max_length:
                raise ContextLengthError(
                    f"The text has {len(ids)} tokens and the context holds {self.max_length}; give shorter pieces."
                )
            with self._driver.at_rest():
                rows = []
                chunk = self.prefill_chunk if self.backend.chunked else self.max_length
                for start in range(0, len(ids), chunk):
                    piece = np.array(ids[start : start + chunk], np.int64)
                    self.backend.prefill(0, piece, start, np.arange(len(piece)), len(ids))
                    assert self.backend.last_hidden is not None
                    rows.append(self.backend.last_hidden.astype(np.float32))
            states.append(np.concatenate(rows))
        return states

    def classify(self, texts: str | Seq[Text], **options: Any) -> list[list[Label]]:
        """All labels of each text, or pair of texts, the likeliest first."""
        return self._encoder("classify").classify([texts] if isinstance(texts, str) else texts, **options)

    def rerank(self, query: str, documents: Seq[str], **options: Any) -> list[Ranked]:
        """Documents by how well they answer `query`, the best first (cross-encoders)."""
        return self._encoder("rerank").rerank(query, documents, **options)

    def classify_tokens(self, texts: str | Seq[str], **options: Any) -> list[list[TokenLabel]]:
        """The likeliest label of every token that stands for text."""
        return self._encoder("classify tokens").classify_tokens([texts] if isinstance(texts, str) else texts, **options)

    def fill_mask(self, texts: str | Seq[str], **options: Any) -> list[list[list[Filled]]]:
        """For each text, for each mask token in it, the likeliest tokens."""
        return self._encoder("fill masks").fill_mask([texts] if isinstance(texts, str) else texts, **options)

    def _encoder(self, what: str) -> Encoder:
        self._driver.check_usable()
        if self.encoder is None:
            raise FamilyError(
                f"{self.folder} generates text and does not {what}; use `llmx run`, or export an encoder "
                "(`llmx export --task embed` makes an embedding model of a decoder)."
            )
        return self.encoder

    def need_generation(self) -> None:
        """Raises FamilyError where the package does not generate text."""
        if self.encoder is not None:
            raise FamilyError(
                f"{self.folder} is an encoder for {self.encoder.info.task} and does not generate text; "
                f"use {COMMANDS[self.encoder.info.task]}."
            )

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue one prompt or many; one RequestOutput each, in order.

        A prompt is text or a list of token ids (taken as they are). `params` is one SamplingParams for all, or one for
        each. Raises RequestError (ContextLengthError for a prompt too long) before anything runs.
        """
        many = as_list(prompts)
        each = self._each_params(params, len(many))
        requests = self._submit([(prompt, p, None) for prompt, p in zip(many, each, strict=True)])
        try:
            return self._finished(requests)
        finally:
            self._abandon(requests)

    def _finished(self, requests: list[Request]) -> list[RequestOutput]:
        self._driver.drive(lambda: all(r.finished for r in requests))
        for request in requests:
            if request.error is not None:
                raise request.error
        return [_output(request) for request in requests]

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

    def chat(
        self,
        messages: Seq[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> RequestOutput | PieceStream:
        """Answer a conversation through the package's chat template; `stream=True` yields pieces instead.

        The answer is taken apart: `outputs[i].message` (a ChatMessage: content, reasoning_content, tool_calls), and
        `delta` of each piece. Options as `chat_request`'s.
        """
        return self.answer(self.chat_request(messages, **options), params, stream=stream)

    def answer(
        self, request: ChatRequest, params: SamplingParams | None = None, *, stream: bool = False
    ) -> RequestOutput | PieceStream:
        """As `chat`, of a request made before."""
        if stream:
            return self.stream(request.token_ids, request.params(params)).map(request.reader())
        return request.parsed(self.generate([request.token_ids], request.params(params))[0])

    def chat_request(self, messages: Seq[Mapping[str, Any]], **options: Any) -> ChatRequest:
        """What `chat` runs: the conversation's prompt, and the parser of the answer. Options:

        tools: JSON schemas of functions, as OpenAI's API has them. documents: mappings with title and text.
        chat_template: the name of one of the package's templates, or a template's text.
        continue_final_message: go on with the last message instead of beginning a new one (a string: this field of it).
        add_generation_prompt: end with the header of the assistant's turn (None: yes, unless continuing).
        tool_calls, reasoning: the format of the answer (docs/chat.md), None to leave it in the text.
        Anything else is a variable of the template. Raises RequestError.
        """
        self.need_generation()
        return self._conversations.request(messages, **options)

    @property
    def conversations(self) -> Conversations:
        """The package's chat templates, and the format of its answers."""
        self.need_generation()
        return self._conversations

    def chat_prompt(self, messages: Seq[Mapping[str, Any]], **options: Any) -> str:
        """The text that the chat template makes of `messages`; options as `chat_request`'s."""
        return self.chat_request(messages, **options).prompt

    def chat_ids(self, messages: Seq[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of `chat_prompt` (the template writes its special tokens itself)."""
        return self.chat_request(messages, **options).token_ids

    def session(self, on_full: str = "stop", keep_first: int = 0) -> Session:
        """A conversation that computes its past once: append, generate, chat, rewind, fork, save. docs/decoding.md.

        `on_full`: where the context has no room for an answer, "stop" refuses it and "shift" forgets the oldest tokens
        but the first `keep_first`. Raises FamilyError where the package does not continue texts.
        """
        return Session(self, on_full, keep_first)

    def load_session(self, path: str | Path) -> Session:
        """A session that `Session.save` wrote. Raises RequestError for another package's or a damaged file,
        ContextLengthError where this LLM's context is too short.
        """
        return Session.load(self, path)

    def score(self, prompts: Prompt | Seq[Prompt]) -> list[list[float]]:
        """Natural-log probability of each token given those before it; the first has none, so n tokens give n - 1.

        Raises RequestError for a prompt without tokens, ContextLengthError for more than `max_length` of them.
        """
        self._need_scores()
        results = []
        for prompt in as_list(prompts):
            ids = self._encode(prompt)
            self.engine.check_ids(ids)
            if len(ids) > self.max_length:
                raise ContextLengthError(
                    f"The text has {len(ids)} tokens and the context holds {self.max_length}; score shorter pieces."
                )
            results.append(self._score(ids, 1))
        return results

    def perplexity(self, text: Prompt, *, stride: int | None = None, max_length: int | None = None) -> Perplexity:
        """Perplexity of a text of any length, with a window of `max_length` tokens (None: the whole context) that moves by
        `stride` (None: half a window) and scores what no window before it scored.

        Raises RequestError for fewer than two tokens, a window beyond the context, or a stride beyond the window.
        """
        self._need_scores()
        ids = self._encode(text)
        self.engine.check_ids(ids)
        length = self.max_length if max_length is None else max_length
        if not 2 <= length <= self.max_length:
            raise RequestError(f"max_length must lie between 2 and {self.max_length}, and is {length}.")
        step = max(1, length // 2) if stride is None else stride
        if not 1 <= step <= length:
            raise RequestError(f"stride must lie between 1 and the window's {length} tokens, and is {step}.")
        if len(ids) < 2:
            raise RequestError("The text has one token, and perplexity needs two; give a longer text.")
        return sliding(ids, length, step, self._score)

    def _need_scores(self) -> None:
        self.need_generation()
        if self.manifest.seq2seq is not None:
            raise FamilyError(f"{self.folder} is an encoder-decoder, whose prompts have no probabilities to score.")

    def _score(self, ids: list[int], first: int) -> list[float]:
        chunk = self.prefill_chunk if self.backend.chunked else self.max_length
        with self._driver.at_rest():
            return score_tokens(self.backend, np.array(ids, np.int64), chunk, first)

    def warmup(self) -> None:
        """Run every graph once, so that the first request meets warm code and touched memory."""
        if self.encoder is not None:
            ones = np.ones((1, min(16, self.max_length)), np.int64)
            self.encoder.run({"input_ids": ones, "attention_mask": ones, "token_type_ids": ones * 0})
            return
        with self._driver.at_rest():
            if self.manifest.seq2seq is not None:
                audio, longest = self.manifest.seq2seq.audio, self.manifest.seq2seq.max_source_length
                silence = log_mel(np.zeros(1, np.float32), audio) if audio is not None else None
                self.backend.encode(0, np.zeros(min(16, longest), np.int64) if silence is None else silence)
            count = min(self.prefill_chunk, self.max_length - 1)
            self.backend.prefill(0, np.zeros(count, np.int64), 0, np.zeros(1, np.int64))
            self.backend.decode(np.zeros(1, np.int64), np.full(1, count))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _submit(
        self, wanted: Seq[tuple[Prompt, SamplingParams, Callable[[StreamPiece], None] | None]]
    ) -> list[Request]:
        self._driver.check_usable()
        self.need_generation()
        requests: list[Request] = []
        try:
            for prompt, params, emit in wanted:
                ids = self._encode(prompt)
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

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            with span("tokenise"):
                return self.tokenizer.encode(prompt)
        if isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, bytearray, memoryview, Mapping)):
            tokens = list(prompt)
            if all(is_token(token) for token in tokens):
                return [operator.index(token) for token in tokens]
        raise RequestError("A prompt must be text or a list of token ids.")

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
        if self.engine.speculator is not None:
            self.engine.speculator.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _prompt_ids(request: Request) -> list[int]:
    """The prompt's tokens as the caller knows them: an encoder-decoder's source, where that is text."""
    source = request.source
    ids: list[int] = source.tolist() if source is not None and source.ndim == 1 else request.prompt_ids
    return ids


def _output(request: Request) -> RequestOutput:
    outputs = [
        CompletionOutput(
            s.index,
            s.text,
            s.output_ids,
            s.logprobs if s.params.logprobs is not None else None,
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
