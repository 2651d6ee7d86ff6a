"""What the endpoints that generate share: a place in the queue, an answer or a stream, their time limit and their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from llmx.serve.errors import api_error
from llmx.serve.models import Generation, Model, Wanted
from llmx.serve.sse import DONE, EventStream, event, to_json, unless_left
from starlette.requests import Request
from starlette.responses import Response

T = TypeVar("T")


async def respond(
    request: Request,
    model: Model,
    places: tuple[int, str],
    prepare: Callable[[], Wanted],
    answer: Callable[[Generation], Any],
    events: Callable[[Generation], AsyncIterator[bytes]] | None,
) -> Response:
    """Run what `prepare` makes of a request. `places`: continuations asked for, and the field that says so.

    Without `events` the response is `answer`'s JSON once all has ended; with it a stream of them. Whatever happens, the
    generation is closed: its slots and its places are free again.
    """
    limit = time.monotonic() + request.app.state.config.request_timeout
    generation = model.generation(*places)
    try:
        async with asyncio.timeout(limit - time.monotonic()):
            if events is None:
                return await unless_left(request, _collect(generation, prepare, answer))
            await unless_left(request, generation.start(prepare))
    except BaseException as error:
        note(request, generation, error)
        generation.close()
        raise
    finally:
        if events is None:
            note(request, generation, None)
            generation.close()

    def end() -> None:
        note(request, generation, None)
        generation.close()

    return EventStream(_guarded(request, generation, events, limit), end, limit)


async def in_time(request: Request, work: Awaitable[T]) -> T:
    """`work`'s result. It is cancelled, and TimeoutError or ClientGoneError raised, where it takes longer than a request may,
    or the client leaves.
    """
    async with asyncio.timeout(request.app.state.config.request_timeout):
        return await unless_left(request, work)


async def _collect(
    generation: Generation, prepare: Callable[[], Wanted], answer: Callable[[Generation], Any]
) -> Response:
    generation.whole = True
    await generation.start(prepare)
    async for _ in generation.pieces():
        pass
    # log-probabilities may be many
    return await generation.model.off_loop(lambda: Response(to_json(answer(generation)), media_type="application/json"))


async def _guarded(
    request: Request, generation: Generation, events: Callable[[Generation], AsyncIterator[bytes]], limit: float
) -> AsyncIterator[bytes]:
    """The events, then `[DONE]`; a failure becomes an `error` event, as the status line has been sent."""
    generation.expire_at(limit)
    try:
        async for item in events(generation):
            yield item
    except Exception as error:
        note(request, generation, error)
        yield event(api_error(error).body(), "error")
    yield DONE


def note(request: Request, generation: Generation, error: BaseException | None) -> None:
    """Leave what the log and the metrics want to know with the request."""
    request.state.generation = generation
    if error is not None:
        request.state.error = error
