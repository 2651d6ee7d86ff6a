"""The packages that a server serves, and the requests that run on them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmx.runtime import LLM, AsyncLLM, LlmxError, RequestError, SamplingParams, Speculation, StreamPiece, load_manifest
from llmx.runtime.encoder import Check
from llmx.runtime.engine_process import load_llm
from llmx.runtime.hub import resolve_package
from llmx.runtime.manifest import Manifest
from llmx.runtime.pump import Mailbox, Pump
from llmx.runtime.remote import AnyRequest, RemoteLLM
from llmx.serve.config import ServeConfig
from llmx.serve.engines import Engine, ProcessEngine, ThreadEngine
from llmx.serve.errors import ApiError, bad_request, busy
from llmx.serve.sse import ClientGoneError

T = TypeVar("T")

#: One prompt of a request: its token ids (or text, of an encoder-decoder) and parameters.
Wanted = list[tuple[str | list[int], SamplingParams]]


class Queue:
    """Owns the places of a model: `slots` continuations run, `waiting` more may wait. Only the event loop touches it."""

    def __init__(self, slots: int, waiting: int) -> None:
        self.slots, self.waiting = slots, waiting
        self.taken = 0
        self.closed = False

    def take(self, count: int, param: str) -> None:
        """Raises ApiError: 429 where no place is free, 400 where there never will be."""
        if self.closed:
            raise ApiError(
                503, "shutting_down", "The server is shutting down; send it again.", headers={"retry-after": "1"}
            )
        if count > self.slots + self.waiting:
            raise bad_request(
                f"The request asks for {count} continuations and the server holds {self.slots + self.waiting}; ask for fewer.",
                param,
            )
        if self.taken + count > self.slots + self.waiting:
            raise busy(f"All {self.slots} slots are busy and {self.waiting} requests wait; try again in a moment.")
        self.taken += count

    def give_back(self, count: int) -> None:
        assert 0 <= count <= self.taken
        self.taken -= count


@dataclass(eq=False)
class Model:
    """A package under its name. `run` serves an encoder, `generate` a model that writes."""

    name: str
    llm: LLM | RemoteLLM
    queue: Queue
    created: int = field(default_factory=lambda: int(time.time()))
    chat_options: dict[str, Any] = field(default_factory=dict)  # of `LLM.chat_request`, for every conversation
    engine: Engine | None = None  # of a model that writes
    _prepare: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "llmx-prepare"))
    _encode: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "llmx-encode"))

    def __post_init__(self) -> None:
        if isinstance(self.llm, RemoteLLM):
            self.engine = ProcessEngine(self.llm)
        elif self.llm.encoder is None:
            self.engine = ThreadEngine(AsyncLLM(llm=self.llm))

    async def off_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run `work` in a thread: tokenizers and templates take milliseconds on long texts."""
        return await asyncio.get_running_loop().run_in_executor(self._prepare, work, *arguments)

    async def run_encoder(self, work: Callable[[Check], T]) -> T:
        """As off_loop, one call at a time: an encoder's run uses all cores. `work` gets a function to call now and then,
        which ends it once nobody waits for it any more.
        """
        self.queue.take(1, "input")
        left = threading.Event()

        def check() -> None:
            if left.is_set():
                raise ClientGoneError

        try:
            return await asyncio.get_running_loop().run_in_executor(self._encode, work, check)
        finally:
            left.set()
            self.queue.give_back(1)

    def generation(self, places: int, param: str) -> Generation:
        """A place for a request that asks for `places` continuations; raises ApiError where there is none."""
        if self.engine is None:
            self.llm.need_generation()
        self.queue.take(places, param)
        assert self.engine is not None
        return Generation(self, self.engine, places)

    @property
    def alive(self) -> bool:
        """Whether the engine takes steps."""
        return self.engine is None or self.engine.alive

    async def aclose(self) -> None:
        if self.engine is not None:
            await self.engine.aclose()
        else:
            await asyncio.to_thread(self.llm.close)
        self._prepare.shutdown(wait=False, cancel_futures=True)
        self._encode.shutdown(wait=False, cancel_futures=True)


class Generation:
    """One API request on an engine: its prompts' requests and their pieces. `close` ends whatever still runs."""

    def __init__(self, model: Model, engine: Engine, places: int) -> None:
        self.model, self._engine, self._places = model, engine, places
        self._lock = threading.Lock()  # of the next two; never held while work is done, as the event loop takes it
        self.requests: Seq[AnyRequest] = []
        self._closed = False
        self._mailbox = Mailbox()
        self.whole = False  # whether nothing but the end of each continuation is waited for; set before `start`
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, prepare: Callable[[], Wanted]) -> None:
        """Run `prepare` and submit what it returns, in a thread. Raises what they raise."""
        await self.model.off_loop(self._submit, prepare)
        try:
            await self._engine.confirm(self.requests)
        except Exception:  # refused; of a client that leaves meanwhile `close` ends them
            self.requests = []
            raise

    def _submit(self, prepare: Callable[[], Wanted]) -> None:
        wanted = prepare()
        if self._closed:
            return
        entries = [(prompt, params, self._receiver(index)) for index, (prompt, params) in enumerate(wanted)]
        requests = self._engine.submit(entries)  # tokenises, and compiles grammars
        with self._lock:
            self.requests, closed = requests, self._closed
        if closed:  # the client left meanwhile
            self._cancel(requests)

    def _receiver(self, index: int) -> Callable[[StreamPiece], None]:
        def receive(piece: StreamPiece) -> None:
            if piece.finish_reason is not None or not self.whole:
                self._engine.put(self._mailbox, (index, piece))

        return receive

    def expire_at(self, limit: float) -> None:
        """From `limit` (time.monotonic) on `pieces` raises TimeoutError."""
        wait = max(0.0, limit - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(wait, self._mailbox.fail, TimeoutError())

    async def pieces(self) -> AsyncIterator[list[tuple[int, StreamPiece]]]:
        """(prompt's index, piece) as they come, as many as there are, until all have ended: one piece for each continuation,
        so that a loop that falls behind has less to do. Raises the first error of a request.
        """
        ended = 0
        while ended < sum(len(request.sequences) for request in self.requests):  # fewer once a beam search has ended
            batch = await self._mailbox.take()
            for number, (index, piece) in enumerate(batch):
                error = self.requests[index].error
                if error is not None:
                    if number:
                        yield merged(batch[:number])
                    raise error
                ended += piece.finish_reason is not None
            yield merged(batch)

    def close(self) -> None:
        """Idempotent; the slots are free before the engine's next step."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            requests = self.requests
        if self._timer is not None:
            self._timer.cancel()
        self.model.queue.give_back(self._places)
        self._cancel(requests)

    def _cancel(self, requests: Seq[AnyRequest]) -> None:
        for request in requests:
            if not request.finished:
                self._engine.cancel(request)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def merged(batch: list[tuple[int, StreamPiece]]) -> list[tuple[int, StreamPiece]]:
    """`batch` with the pieces of each continuation joined: texts, tokens and log-probabilities in order, the last one's end."""
    if len(batch) == 1:
        return batch
    runs: dict[tuple[int, int], list[StreamPiece]] = {}
    for index, piece in batch:
        runs.setdefault((index, piece.index), []).append(piece)
    return [(index, run[0] if len(run) == 1 else _joined(run)) for (index, _), run in runs.items()]


def _joined(run: list[StreamPiece]) -> StreamPiece:
    last = run[-1]
    logprobs = [entry for piece in run for entry in piece.logprobs or ()] or None
    return StreamPiece(
        "".join([piece.text for piece in run]),
        [token for piece in run for token in piece.token_ids],
        last.index,
        last.finish_reason,
        last.stop_reason,
        logprobs,
        last.metrics,
    )


class Models:
    """All models of a server, the first being the default."""

    def __init__(self, models: list[Model]) -> None:
        self._models = {model.name: model for model in models}
        #: Called in the event loop where an engine has ended unasked.
        self.died: Callable[[], None] = lambda: None

    def start(self, pump: Pump) -> None:
        """In the event loop that serves them."""
        for model in self:
            if model.engine is not None:
                model.engine.start(pump, lambda: self.died())

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def get(self, name: str | None) -> Model:
        """Raises ApiError 404 for a name that is not served."""
        if name is None:
            return next(iter(self))
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(
                404, "model_not_found", f"There is no model named {name[:200]!r}; this server has: {known}.", "model"
            )
        return self._models[name]

    async def aclose(self) -> None:
        for model in self:
            await model.aclose()


def load_models(config: ServeConfig) -> Models:
    """Load every package of `config`. Raises LlmxError subclasses; what was loaded before is closed then."""
    if not config.onnx:
        raise RequestError(
            "There is nothing to serve; give --onnx DIR (or NAME=DIR, several times for several packages)."
        )
    with contextlib.ExitStack() as loaded:
        models: list[Model] = []
        for entry in config.onnx:
            name, path = _name_and_path(entry)
            if name in [m.name for m in models]:
                raise RequestError(
                    f"Two packages are named {name!r}; give one of them another name: --onnx NAME={path}."
                )
            llm = _open(path, config)
            loaded.callback(llm.close)
            slots = config.slots if llm.encoder is None else 1
            model = Model(name, llm, Queue(slots, config.max_queue))
            models.append(model)
            if llm.encoder is None:
                model.chat_options = _chat_options(llm, config)
        loaded.pop_all()
    return Models(models)


def _open(path: str, config: ServeConfig) -> LLM | RemoteLLM:
    """Raises LlmxError subclasses that name the package."""
    options: dict[str, Any] = {
        "max_length": config.max_length, "slots": config.slots, "threads": config.threads, "spin": config.spin,
        "prefill_chunk": config.prefill_chunk, "prefix_cache_bytes": int(config.prefix_cache * 1e6),
        "kv_cache_memory_bytes": None if config.kv_cache_memory is None else int(config.kv_cache_memory * 1e6),
        "speculative": _speculation(path, config),
    }  # fmt: skip
    try:
        folder = resolve_package(path, None)
        load = partial(load_llm, folder, config.device, **options)
        return RemoteLLM(folder, load) if _in_process(load_manifest(folder), config) else load()
    except LlmxError as error:
        error.args = (f"{path}: {error}" if path not in str(error) else str(error),)
        raise


def _in_process(manifest: Manifest, config: ServeConfig) -> bool:
    """Whether a package's engine gets a process of its own. Encoders take no steps, and stay. Raises RequestError."""
    if manifest.family == "encoder" or config.engine_process is False:
        return False
    if config.engine_process and not hasattr(socket, "AF_UNIX"):
        raise RequestError("--engine-process needs a Unix system; leave it out here.")
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and manifest.target == "cuda")
    return bool(config.engine_process or (on_gpu and hasattr(socket, "AF_UNIX")))


def _speculation(path: str, config: ServeConfig) -> Speculation | None:
    """Who guesses for the package at `path`; an encoder has nothing to guess. Raises RequestError."""
    if config.draft is not None and config.prompt_lookup:
        raise RequestError("Give --draft or --prompt-lookup, not both.")
    if config.draft is None and not config.prompt_lookup:
        if config.num_speculative_tokens is not None:
            raise RequestError("--num-speculative-tokens goes with --draft or --prompt-lookup.")
        return None
    if load_manifest(resolve_package(path, None)).family == "encoder":
        return None
    return Speculation(config.draft, config.prompt_lookup, config.num_speculative_tokens)


def _chat_options(llm: LLM | RemoteLLM, config: ServeConfig) -> dict[str, Any]:
    """Raises RequestError for a template that cannot be read, or a format that there is not."""
    template = config.chat_template
    if template is not None and Path(template).is_file():
        template = Path(template).read_text(encoding="utf-8")
    parsers = {"tool_calls": config.tool_call_parser, "reasoning": config.reasoning_parser}
    options = {name: None if value == "none" else value for name, value in parsers.items()}
    if template is not None:
        llm.conversations.template(template)
    llm.conversations.format(**options, chat_template=template)
    return {"chat_template": template, **options}


def _name_and_path(entry: str) -> tuple[str, str]:
    """ "NAME=DIR", or a folder or hub id that names itself."""
    name, sign, path = entry.partition("=")
    if sign and name and path and not Path(entry).exists():
        return name, path
    return (Path(entry).resolve().name if Path(entry).exists() else entry), entry
