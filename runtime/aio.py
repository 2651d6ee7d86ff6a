"""`AsyncLLM`: the same in asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import aclosing
from pathlib import Path
from typing import Any

from llmx.runtime.aio_session import AsyncSession
from llmx.runtime.errors import ClosedError, EngineDeadError
from llmx.runtime.llm import LLM, output_of
from llmx.runtime.outputs import RequestOutput, StreamPiece
from llmx.runtime.params import SamplingParams
from llmx.runtime.prompts import Prompt, as_list
from llmx.runtime.pump import Mailbox, Pump
from llmx.runtime.scheduler import Request
from llmx.runtime.structured import StructuredOutputsParams

#: Receives the pieces of a request, in the thread that steps the engine.
Emit = Callable[[StreamPiece], None]


class AsyncLLM:
    """An LLM behind coroutines. One thread of its own steps the engine while there is work, and sleeps otherwise.

    Cancelling a task (or leaving an `async for`) frees the request's slot before the next step. Requests of all tasks
    and event loops share the batch. Arguments are those of LLM; `llm` takes one that exists.
    """

    def __init__(
        self, model: str | Path | None = None, device: str = "auto", *, llm: LLM | None = None, **settings: Any
    ) -> None:
        if llm is None:
            if model is None:
                raise TypeError("AsyncLLM needs a model or an llm")
            llm = LLM(model, device, **settings)
        self.llm = llm
        self._wake = threading.Event()
        self._stop = False
        self._lock = threading.Lock()
        self._pumps: dict[asyncio.AbstractEventLoop, Pump] = {}
        #: Called by the engine's thread where a fault ends it; whoever waits has been told.
        self.died: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="llmx-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompts: Prompt | Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """As LLM.generate. Cancelling the awaiting task ends its requests."""
        many = as_list(prompts)
        each = self.llm._each_params(params, len(many))
        await self._compile(each)
        return await self._finished(lambda emit: self.submit([(p, q, emit) for p, q in zip(many, each, strict=True)]))

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[StreamPiece, None]:
        """As LLM.stream, as an async iterator."""
        wanted = params or SamplingParams()
        await self._compile([wanted])
        async with aclosing(self._pieces(lambda emit: self.submit([(prompt, wanted, emit)])[0])) as pieces:
            async for piece in pieces:
                yield piece

    async def _finished(self, submit: Callable[[Emit], list[Request]]) -> list[RequestOutput]:
        """Outputs of the requests that `submit` queues with a receiver. Raises what ended one of them."""
        pump, mailbox = self._pump(), Mailbox()
        requests: list[Request] = []

        def emit(piece: StreamPiece) -> None:
            if piece.finish_reason is not None:
                pump.put(mailbox, piece)

        try:
            requests = submit(emit)
            while not all(r.finished for r in requests):
                await mailbox.take()
        finally:
            self.llm._abandon(requests)
        for request in requests:
            if request.error is not None:
                raise request.error
        return [output_of(request) for request in requests]

    async def _pieces(self, submit: Callable[[Emit], Request]) -> AsyncGenerator[StreamPiece, None]:
        """Pieces of the request that `submit` queues with a receiver."""
        pump, mailbox = self._pump(), Mailbox()
        request = submit(lambda piece: pump.put(mailbox, piece))
        ended = 0
        try:
            while ended < len(request.sequences):  # a beam search ends with fewer than it has beams
                for piece in await mailbox.take():
                    if request.error is not None:
                        raise request.error
                    ended += piece.finish_reason is not None
                    yield piece
        finally:
            self.llm._abandon([request])

    def _pump(self) -> Pump:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        self.llm.need_generation()
        with self._lock:
            self._pumps = {known: pump for known, pump in self._pumps.items() if not known.is_closed()}
            if loop not in self._pumps:
                self._pumps[loop] = Pump(loop)
                self.llm.engine.add_waker(self._pumps[loop].wake)
            return self._pumps[loop]

    async def chat(
        self, messages: Seq[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """As LLM.chat."""
        request = self.llm.chat_request(messages, **options)
        return request.parsed((await self.generate([request.token_ids], request.params(params)))[0])

    async def chat_stream(
        self, messages: Seq[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[StreamPiece, None]:
        """As LLM.chat with `stream=True`, as an async iterator."""
        request = self.llm.chat_request(messages, **options)
        read = request.reader()
        async with aclosing(self.stream(request.token_ids, request.params(params))) as pieces:
            async for piece in pieces:
                yield read(piece)

    def session(self, on_full: str = "stop", keep_first: int = 0) -> AsyncSession:
        """As LLM.session."""
        return AsyncSession(self, self.llm.session(on_full, keep_first))

    async def load_session(self, path: str | Path) -> AsyncSession:
        """As LLM.load_session."""
        return AsyncSession(self, await asyncio.to_thread(self.llm.load_session, path))

    async def _compile(self, each: Seq[SamplingParams]) -> None:
        """Compile grammars in another thread: they may take a second, and the event loop has others to serve."""
        for params in each:
            form = params.structured_outputs
            if form is not None and self.llm.encoder is None:
                await asyncio.to_thread(self.llm.engine.grammars.compile, StructuredOutputsParams.of(form))

    def submit(self, wanted: Seq[tuple[Prompt, SamplingParams, Callable[[StreamPiece], None] | None]]) -> list[Request]:
        """Queue requests from any thread; their receivers are called with each piece from the engine's thread.

        For services that deliver pieces their own way. Raises RequestError before anything runs.
        """
        if self.closed:
            raise ClosedError("This AsyncLLM was closed; create a new one.")
        requests = self.llm._submit(wanted)
        self.wake()
        return requests

    def wake(self) -> None:
        """Something was queued: the engine's thread goes on."""
        self._wake.set()

    @property
    def closed(self) -> bool:
        """Whether no request is taken any more."""
        return self._stop

    @property
    def alive(self) -> bool:
        """Whether the thread that steps the engine runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._take_steps()
        except BaseException:  # of a step, what fails there ends its requests; this is a bug beside them
            try:
                self.llm._driver.fail(EngineDeadError, "The thread that runs the model has ended; start it again.")
            finally:
                self.died()
            raise

    def _take_steps(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._stop:
                return
            try:
                self.llm._driver.drive(lambda: self._stop or not self.llm._driver.has_work)
            except ClosedError:
                return

    async def aclose(self) -> None:
        """Stop the thread after the step in progress and close the LLM; unfinished requests get ClosedError."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._stop = True
        self._wake.set()
        self.llm._driver.wake()
        self._thread.join()
        self.llm.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
