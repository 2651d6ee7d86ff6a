"""Where a model's engine runs: in a thread of this process, or in a process of its own. Both alike to the rest of the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, Protocol

from llmx.runtime import AsyncLLM, LlmxError, SamplingParams, StreamPiece
from llmx.runtime.engine_stats import EngineStats, engine_stats
from llmx.runtime.pump import Mailbox, Pump
from llmx.runtime.remote import AnyRequest, RemoteLLM

Wish = tuple[str | list[int], SamplingParams, Callable[[StreamPiece], None]]


class Engine(Protocol):
    """What the server asks of an engine."""

    @property
    def alive(self) -> bool:
        """Whether it takes steps."""

    @property
    def died(self) -> bool:
        """Whether it has ended unasked."""

    @property
    def pid(self) -> int | None:
        """Its process, where that is not this one."""

    def start(self, pump: Pump, died: Callable[[], None]) -> None:
        """In the event loop, before the first request; `died` is called there where the engine ends unasked."""

    def submit(self, wanted: Seq[Wish]) -> Seq[AnyRequest]:
        """From any thread. Raises what the request may not ask."""

    async def confirm(self, requests: Seq[AnyRequest]) -> None:
        """Return once all that one `submit` gave back is taken. Raises why it is not."""

    def put(self, mailbox: Mailbox, item: Any) -> None:
        """From a receiver: `item` to a reader in the event loop."""

    def cancel(self, request: AnyRequest) -> None: ...

    async def stats(self) -> EngineStats: ...

    def how_it_ended(self) -> str:
        """One sentence's beginning, of an engine that is not alive."""

    async def aclose(self) -> None: ...


class ThreadEngine:
    """An LLM that a thread of this process steps."""

    pid: int | None = None

    def __init__(self, aio: AsyncLLM) -> None:
        self.aio = aio
        self.died = False
        self._pump: Pump

    @property
    def alive(self) -> bool:
        return self.aio.alive and not self.died

    def start(self, pump: Pump, died: Callable[[], None]) -> None:
        self._pump, loop = pump, asyncio.get_running_loop()

        def lost() -> None:
            loop.call_soon_threadsafe(self._lost, died)

        self.aio.died = lost
        self.aio.llm.engine.add_waker(pump.wake)

    def _lost(self, tell: Callable[[], None]) -> None:
        self.died = True
        tell()

    def submit(self, wanted: Seq[Wish]) -> Seq[AnyRequest]:
        return self.aio.submit(wanted)

    async def confirm(self, requests: Seq[AnyRequest]) -> None:
        pass

    def put(self, mailbox: Mailbox, item: Any) -> None:
        self._pump.put(mailbox, item)

    def cancel(self, request: Any) -> None:
        self.aio.llm.engine.cancel(request)

    async def stats(self) -> EngineStats:
        return engine_stats(self.aio.llm)

    def how_it_ended(self) -> str:
        return "The engine's thread has ended"

    async def aclose(self) -> None:
        await self.aio.aclose()


class ProcessEngine:
    """An LLM in a process of its own."""

    def __init__(self, llm: RemoteLLM) -> None:
        self._llm = llm
        self._stats = EngineStats()

    @property
    def alive(self) -> bool:
        return self._llm.alive

    @property
    def died(self) -> bool:
        return self._llm.died

    @property
    def pid(self) -> int | None:
        return self._llm.pid

    def start(self, pump: Pump, died: Callable[[], None]) -> None:
        self._llm.attach(asyncio.get_running_loop(), died)

    def submit(self, wanted: Seq[Wish]) -> Seq[AnyRequest]:
        return self._llm.submit(wanted)

    async def confirm(self, requests: Seq[Any]) -> None:
        await self._llm.confirm(requests)

    def put(self, mailbox: Mailbox, item: Any) -> None:
        mailbox.put(item)  # receivers run in the loop

    def cancel(self, request: Any) -> None:
        self._llm.cancel(request)

    async def stats(self) -> EngineStats:
        """The last known, where the process does not answer."""
        with contextlib.suppress(LlmxError, TimeoutError):
            self._stats = await self._llm.stats()
        return self._stats

    def how_it_ended(self) -> str:
        return self._llm.how_it_ended()

    async def aclose(self) -> None:
        await self._llm.aclose()
