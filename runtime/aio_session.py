"""`AsyncSession`: a conversation whose past is computed once, in asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.runtime.errors import ClosedError
from llmx.runtime.outputs import RequestOutput, StreamPiece
from llmx.runtime.params import SamplingParams
from llmx.runtime.prompts import Prompt

if TYPE_CHECKING:
    from llmx.runtime.aio import AsyncLLM
    from llmx.runtime.scheduler import Request
    from llmx.runtime.session import Session


class AsyncSession:
    """A Session behind coroutines (`AsyncLLM.session`). Cancelling a task keeps what was said until then.

    One call at a time, as of Session; `session` is the Session itself.
    """

    def __init__(self, llm: AsyncLLM, session: Session) -> None:
        self._llm, self.session = llm, session

    @property
    def tokens(self) -> list[int]:
        """As Session.tokens."""
        return self.session.tokens

    @property
    def text(self) -> str:
        """As Session.text."""
        return self.session.text

    @property
    def num_cached(self) -> int:
        """As Session.num_cached."""
        return self.session.num_cached

    def __len__(self) -> int:
        return len(self.session)

    async def append(self, prompt: Prompt) -> AsyncSession:
        """As Session.append."""
        await asyncio.to_thread(self.session.append, prompt)
        return self

    async def rewind(self, position: int) -> AsyncSession:
        """As Session.rewind."""
        await asyncio.to_thread(self.session.rewind, position)
        return self

    async def fork(self) -> AsyncSession:
        """As Session.fork."""
        return AsyncSession(self._llm, await asyncio.to_thread(self.session.fork))

    async def save(self, path: str | Path) -> None:
        """As Session.save."""
        await asyncio.to_thread(self.session.save, path)

    async def generate(self, params: SamplingParams | None = None) -> RequestOutput:
        """As Session.generate."""
        await self._ready(params)
        [output] = await self._llm._finished(lambda emit: [self._submit(params, emit)])
        return output

    async def stream(self, params: SamplingParams | None = None) -> AsyncGenerator[StreamPiece, None]:
        """As Session.stream, as an async iterator."""
        await self._ready(params)
        async with aclosing(self._llm._pieces(lambda emit: self._submit(params, emit))) as pieces:
            async for piece in pieces:
                yield piece

    async def chat(
        self, messages: Seq[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """As Session.chat."""
        asked = await asyncio.to_thread(self.session.ask, messages, **options)
        return asked.parsed(await self.generate(asked.params(params)))

    async def chat_stream(
        self, messages: Seq[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[StreamPiece, None]:
        """As Session.chat with `stream=True`, as an async iterator."""
        asked = await asyncio.to_thread(self.session.ask, messages, **options)
        read = asked.reader()
        async with aclosing(self.stream(asked.params(params))) as pieces:
            async for piece in pieces:
                yield read(piece)

    async def _ready(self, params: SamplingParams | None) -> None:
        """Compile a grammar, and wait for a request that was given up, without holding up the event loop."""
        await self._llm._compile([params or SamplingParams()])
        await asyncio.to_thread(self.session._settle)

    def _submit(self, params: SamplingParams | None, emit: Callable[[StreamPiece], None]) -> Request:
        if self._llm.closed:
            raise ClosedError("This AsyncLLM was closed; create a new one.")
        request = self.session._submit(params, emit)
        self._llm.wake()
        return request
