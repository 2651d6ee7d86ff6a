"""An LLM whose engine has a process of its own, as a server sees it: texts and templates here, tokens there.

Two threads of one Python process share its interpreter lock, so what a server does for each token holds up the engine's
next step. Here only messages pass between the two, one for each step (`engine_process`).
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from llmx.runtime.channel import Channel
from llmx.runtime.driver import CLOSED
from llmx.runtime.engine_process import INDEX_BITS, is_search
from llmx.runtime.engine_stats import EngineStats
from llmx.runtime.errors import ClosedError, EngineDeadError, LlmxError
from llmx.runtime.llm_chat import ChatMethods
from llmx.runtime.manifest import load_manifest
from llmx.runtime.outputs import Logprob, RequestMetrics, StreamPiece, TokenLogprobs
from llmx.runtime.params import SamplingParams
from llmx.runtime.prompts import Prompt, check_fits
from llmx.runtime.scheduler import Request, Sequence
from llmx.runtime.tokenizer import Tokenizer

# A terminal or a supervisor signals all processes; the other side ends this one, also while it still imports.
_PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "from llmx.runtime.engine_process import main; main()"
)
_END = 15.0  # seconds that the process gets to end
Receive = Callable[[StreamPiece], None]


class RemoteSequence:
    """What is known here of a continuation: what has been handed over."""

    def __init__(self, request: RemoteRequest, index: int) -> None:
        self.request, self.index = request, index
        self.texts: list[str] = []
        self.output_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        """The output's text so far."""
        return "".join(self.texts)

    @property
    def num_output(self) -> int:
        return len(self.output_ids)


class RemoteRequest:
    """What is known here of a request; the fields of `scheduler.Request` that its caller reads."""

    def __init__(
        self, number: int, prompt: str | None, prompt_ids: list[int], params: SamplingParams, receive: Receive
    ) -> None:
        self.number, self.prompt, self.prompt_ids, self.params, self.receive = (
            number,
            prompt,
            prompt_ids,
            params,
            receive,
        )
        self.metrics = RequestMetrics()
        self.error: BaseException | None = None
        self.packed: list[bytes] | None = None  # `engine_process.packed`
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.is_search = is_search(params)
        self.taken: Future[None] = Future()  # shared by the requests of one `submit`
        self.sequences = [RemoteSequence(self, index) for index in range(params.num_sequences)]

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Made where they are asked for, which of long prompts takes a second."""
        if self._prompt_logprobs is None and self.packed is not None:
            self._prompt_logprobs = [_entries(pickle.loads(entry))[0] for entry in self.packed]
        return self._prompt_logprobs

    @property
    def finished(self) -> bool:
        return self.error is not None or all(s.finish_reason is not None for s in self.sequences)

    def fail(self, error: BaseException) -> None:
        """End it with `error`."""
        self.error = error
        for sequence in self.sequences:
            sequence.finish_reason = sequence.finish_reason or "abort"


AnyRequest = Request | RemoteRequest
AnySequence = Sequence | RemoteSequence


class RemoteLLM(ChatMethods):
    """A package whose engine runs in a process of its own, started here and ended with this one, however that ends.

    `load` makes the LLM there, and can be pickled; `folder` is its package. `submit` and `cancel` may be called from any
    thread; messages are read by the event loop that `attach` names, and receivers called there. Raises what loading raises.
    """

    def __init__(self, folder: Path, load: Callable[[], Any]) -> None:
        self.folder, self.manifest, self.encoder = folder, load_manifest(folder), None
        self.tokenizer = Tokenizer.load(folder, self.manifest.tokenizer)
        self._requests: dict[int, RemoteRequest] = {}
        self._sequences: dict[int, RemoteSequence] = {}  # by their keys
        self._replies: dict[int, Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of what is waited for, against the process's end
        self._dead = self._closing = False
        self.died = False  # whether the process has ended unasked
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_death: Callable[[], None] = lambda: None
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        self._channel = Channel(ours)
        try:
            self._channel.send(("load", load))
            kind, found = self._channel.receive()
            if kind == "failed":
                raise found
        except EOFError:
            raise EngineDeadError(f"{folder}: {self.how_it_ended()} while it loaded.") from None
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        self._max_length: int = found["max_length"]
        self.slots: int = found["slots"]

    @property
    def max_length(self) -> int:
        """Positions that a request may take, prompt and output together."""
        return self._max_length

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return not self._dead

    def attach(self, loop: asyncio.AbstractEventLoop, died: Callable[[], None]) -> None:
        """Read messages in `loop`, and call `died` there where the process ends unasked."""
        self._loop, self._on_death = loop, died
        loop.add_reader(self._channel.fileno(), self._read)

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, wanted: Seq[tuple[Prompt, SamplingParams, Receive]]) -> list[RemoteRequest]:
        """Send requests; their receivers are called with each piece. Whether they can run, `confirm` says. Raises
        RequestError for what is found here.
        """
        requests = [self._request(*each) for each in wanted]
        message = [r.number for r in requests], [(r.prompt_ids, r.params) for r in requests]
        if self.manifest.seq2seq is not None:  # the text is the encoder's, what goes on the decoder's
            for request in requests:
                request.prompt_ids = list(self.manifest.seq2seq.decoder_prompt)
        with self._lock:
            self._check()
            for request in requests:
                request.taken = requests[0].taken
                self._requests[request.number] = request
                for sequence in request.sequences:
                    self._sequences[request.number << INDEX_BITS | sequence.index] = sequence
            self._replies[requests[0].number] = requests[0].taken
        self._channel.send(("submit", *message))
        return requests

    def _request(self, prompt: Prompt, params: SamplingParams, receive: Receive) -> RemoteRequest:
        ids = self._encode(prompt)
        text = prompt if isinstance(prompt, str) else None
        if self.manifest.seq2seq is None:
            check_fits(len(ids), self.max_length)  # else the engine would stand still to read them
        return RemoteRequest(next(self._numbers), text, ids, params.resolved(self.manifest.generation), receive)

    @staticmethod
    async def confirm(requests: Seq[RemoteRequest]) -> None:
        """Return once the engine has taken `requests`, all of one `submit`. Raises why it does not."""
        if requests:
            await asyncio.wrap_future(requests[0].taken)

    def cancel(self, request: RemoteRequest) -> None:
        """End a request; its slot is free before the step that follows the message."""
        if not request.finished:
            self._channel.send(("cancel", request.number))

    async def stats(self, timeout: float = 5.0) -> EngineStats:
        """What the engine says of itself. Raises EngineDeadError, TimeoutError."""
        number = next(self._numbers)
        with self._lock:
            self._check()
            future = self._replies[number] = Future()
        self._channel.send(("stats", number))
        try:
            async with asyncio.timeout(timeout):
                found: EngineStats = await asyncio.wrap_future(future)
            return found
        finally:
            self._replies.pop(number, None)

    def _check(self) -> None:
        if self._closing:
            raise ClosedError(CLOSED)
        if self._dead:
            raise EngineDeadError("The engine's process has ended; restart the server.")

    # -- what comes, in the event loop --------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            for kind, *rest in self._channel.available():
                getattr(self, f"_on_{kind}")(*rest)
        except Exception:  # a fault of this program; else requests would wait for ever
            traceback.print_exc()
            self._process.kill()
            self._channel.ended = True
        if self._channel.ended:
            self._lost()

    def _on_step(
        self, now: float, keys: list[int], texts: list[str], tokens: list[int], others: list[Any], ends: list[Any]
    ) -> None:
        """The pieces of a step; `engine_process` says in which form."""
        known = self._sequences
        for key, text, token in zip(keys, texts, tokens, strict=True):
            sequence = known.get(key)
            if sequence is None:
                continue
            sequence.texts.append(text)
            sequence.output_ids.append(token)
            request = sequence.request
            metrics = request.metrics
            metrics.num_output_tokens += 1
            metrics.last_token = now
            request.receive(StreamPiece(text, [token], sequence.index))
        for key, *piece in others:
            sequence = known.get(key)
            if sequence is not None:
                self._take(sequence, now, *piece)
        for end in ends:
            self._end(*end)

    def _take(
        self, sequence: RemoteSequence, now: float, text: str, ids: list[int], finish: str | None,
        stop: int | str | None, logprobs: Any, metrics: RequestMetrics | None, prompt: Any,
    ) -> None:  # fmt: skip
        request, entries = sequence.request, _entries(logprobs)
        if not request.is_search:  # else its outputs come whole, at its end
            sequence.texts.append(text)
            sequence.output_ids += ids
            sequence.logprobs += entries or ()
            if finish is not None and sequence.finish_reason is None:
                sequence.finish_reason, sequence.stop_reason = finish, stop
        if metrics is not None:
            request.metrics = metrics
        else:
            request.metrics.num_output_tokens += len(ids)
            request.metrics.last_token = now
        if prompt is not None:
            request.packed = prompt
        request.receive(StreamPiece(text, ids, sequence.index, finish, stop, entries))

    def _end(self, number: int, error: BaseException | None, metrics: RequestMetrics, outputs: Any) -> None:
        request = self._requests.get(number)
        if request is None:
            return
        self._forget(request)
        request.metrics = metrics
        if outputs is not None:
            request.sequences = request.sequences[: len(outputs)]
            for sequence, output in zip(request.sequences, outputs, strict=True):
                sequence.index, text, sequence.output_ids, logprobs, sequence.finish_reason, sequence.stop_reason = (
                    output
                )
                sequence.texts, sequence.logprobs = [text], _entries(logprobs) or []
        if error is not None:
            request.fail(error)

    def _on_submitted(
        self, numbers: list[int], error: BaseException | None, metrics: list[RequestMetrics | None]
    ) -> None:
        requests = [self._requests.get(number) for number in numbers]
        for request, known in itertools.zip_longest(requests, metrics):
            if request is None:  # it has ended already
                continue
            if error is not None or known is None:
                self._forget(request)
            elif not request.metrics.arrival:  # else a piece has brought later ones
                request.metrics = replace(known, first_token=0.0, last_token=0.0, num_output_tokens=0)
        _answer(self._replies.pop(numbers[0], None), None, error)

    def _on_told(self, number: int, stats: EngineStats) -> None:
        _answer(self._replies.pop(number, None), stats)

    def _forget(self, request: RemoteRequest) -> None:
        self._requests.pop(request.number, None)
        for sequence in request.sequences:
            self._sequences.pop(request.number << INDEX_BITS | sequence.index, None)

    # -- its end ------------------------------------------------------------------------------------------------------

    def _lost(self) -> None:
        """The process has ended. What waits for it gets an error."""
        assert self._loop is not None
        self._loop.remove_reader(self._channel.fileno())
        with self._lock:
            self._dead = True
            replies, self._replies = self._replies, {}
            requests, self._requests, self._sequences = self._requests, {}, {}
        for future in replies.values():
            _answer(future, None, self._end_error())
        for request in requests.values():
            request.fail(self._end_error())
            request.receive(StreamPiece("", [], 0, "abort"))
        if not self._closing:
            self.died = True
            self._on_death()

    def _end_error(self) -> LlmxError:
        if self._closing:
            return ClosedError(CLOSED)
        return EngineDeadError("The process that runs the model has ended; the server ends as well. Send it again.")

    def how_it_ended(self) -> str:
        """Of a process that has ended, or is about to; waits for that."""
        try:
            status = self._process.wait(_END)
        except subprocess.TimeoutExpired:
            return "The engine's process closed its connection"
        if status < 0:
            return f"The engine's process was ended by signal {-status} ({signal.Signals(-status).name})"
        return f"The engine's process ended with status {status}"

    def close(self) -> None:
        """End the process after the step in progress; unfinished requests get ClosedError. Idempotent."""
        self._closing = True
        self._channel.send(("close",))
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._loop is None:
            self._channel.close()

    async def aclose(self) -> None:
        """As `close`, while the loop goes on."""
        await asyncio.to_thread(self.close)
        if self._loop is not None:
            while not self._dead:  # the process has ended, so its last messages and then the end are there
                self._read()
            self._channel.close()

    def __enter__(self) -> RemoteLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer(future: Future[Any] | None, value: Any, error: BaseException | None = None) -> None:
    if future is None or future.done():  # nobody waits any more
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _entries(portable: Any) -> Any:
    """What `portable_entries` made plain."""
    if portable is None:
        return None
    return [entry and {token: Logprob(*values) for token, values in entry.items()} for entry in portable]
