"""A load generator for OpenAI-compatible servers: random prompts, arrivals in time, streamed answers timed chunk by chunk.

Names and definitions are those of vLLM's `bench serve`: a request's clock starts when it is sent (not while it waits for
`max_concurrency`), TTFT ends at its first chunk of output, ITL are the gaps between chunks of output, E2EL ends at the last.
Arrivals are a Poisson process of `request_rate` requests a second (infinite: all at once).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llmx.runtime.errors import LlmxError, MissingDependencyError, RequestError

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Load:
    """What is asked of the server, how often and how much at once."""

    base_url: str
    model: str | None = None
    backend: str = "openai"
    endpoint: str | None = None
    api_key: str | None = None
    num_prompts: int = 100
    request_rate: float = float("inf")
    max_concurrency: int | None = None
    input_len: int = 128
    output_len: int = 64
    prefix_len: int = 0
    range_ratio: float = 0.0
    ignore_eos: bool = False
    temperature: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    vocab_size: int = 1000
    seed: int = 0
    timeout: float = 600.0

    @property
    def path(self) -> str:
        return self.endpoint or ENDPOINTS[self.backend]


@dataclass
class Outcome:
    """One request's answer. Times in seconds; `start` on the clock of `time.perf_counter`."""

    prompt_len: int
    start: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    gaps: list[float] = field(default_factory=list)
    output_tokens: int = 0
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Seconds between output tokens after the first; None for a single token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass(frozen=True)
class Prompt:
    """Token ids, or text where the endpoint takes text alone."""

    content: list[int] | str
    input_len: int
    output_len: int


def make_prompts(load: Load) -> list[Prompt]:
    """`num_prompts` random prompts; all begin with the same `prefix_len` tokens. Lengths vary by `range_ratio` either way."""
    rng = np.random.default_rng(load.seed)
    tokenizer = _tokenizer(load.tokenizer) if load.tokenizer is not None else None
    vocab = load.vocab_size if tokenizer is None else min(load.vocab_size, tokenizer.get_vocab_size())
    prefix = rng.integers(0, vocab, load.prefix_len).tolist()

    def length(wanted: int) -> int:
        low, high = int(wanted * (1 - load.range_ratio)), int(np.ceil(wanted * (1 + load.range_ratio)))
        return int(rng.integers(max(1, low), max(1, high) + 1))

    prompts = []
    for _ in range(load.num_prompts):
        size, output = length(load.input_len), length(load.output_len)
        ids = prefix + rng.integers(0, vocab, size).tolist()
        content: list[int] | str = ids
        if load.backend == "openai-chat" or tokenizer is not None:
            content = _text(tokenizer, ids)
        prompts.append(Prompt(content, len(ids), output))
    return prompts


def _tokenizer(where: str) -> Any:
    from pathlib import Path

    import tokenizers

    path = Path(where)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise RequestError(f"--tokenizer: {file} cannot be read ({' '.join(str(error).split())[:120]}).") from None


def _text(tokenizer: Any, ids: list[int]) -> str:
    """Text of about as many tokens: decoded, or, without a tokenizer, a short word for each."""
    if tokenizer is None:
        return " ".join(_WORDS[i % len(_WORDS)] for i in ids)
    return str(tokenizer.decode(ids))


_WORDS = (
    "the",
    "and",
    "you",
    "that",
    "was",
    "for",
    "are",
    "with",
    "his",
    "they",
    "one",
    "have",
    "this",
    "from",
    "had",
    "not",
)


def body_of(load: Load, model: str, prompt: Prompt) -> dict[str, Any]:
    """The JSON of a request."""
    body: dict[str, Any] = {"model": model, "temperature": load.temperature, "max_tokens": prompt.output_len}
    if load.backend == "openai-chat":
        body["messages"] = [{"role": "user", "content": prompt.content}]
    else:
        body["prompt"] = prompt.content
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if load.ignore_eos:
        body["ignore_eos"] = True
    return body | load.extra_body


class Client:
    """Sends requests to one server and times the answers."""

    def __init__(self, load: Load) -> None:
        try:
            import h11
            import httpx
            from llmx.bench.stream import Connections
        except ImportError:
            raise MissingDependencyError('`llmx bench serve` needs httpx: pip install "llmx[bench]".') from None
        self._httpx = httpx
        self.load = load
        headers = {"authorization": f"Bearer {load.api_key}"} if load.api_key else {}
        self._client = httpx.AsyncClient(
            base_url=load.base_url.rstrip("/"), headers=headers, timeout=load.timeout, trust_env=False
        )
        self._connections = Connections(load.base_url, headers, load.timeout)
        self._failures = (h11.ProtocolError, httpx.HTTPError, OSError, ValueError)
        self.model = load.model or ""

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._connections.close()
        await self._client.aclose()

    async def find_model(self) -> None:
        """Take the server's first model where none is named. Raises LlmxError where there is no such server."""
        if self.model:
            return
        try:
            answer = await self._client.get("/v1/models")
            answer.raise_for_status()
            self.model = answer.json()["data"][0]["id"]
        except (self._httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise LlmxError(
                f"{self.load.base_url}/v1/models: {self._reason(error)}; name the model by --model."
            ) from None

    async def send(self, prompt: Prompt) -> Outcome:
        """Send one request and read its answer to the end; a failure is the outcome's `error`."""
        outcome = Outcome(prompt.input_len)
        body = json.dumps(body_of(self.load, self.model, prompt)).encode()
        outcome.start = time.perf_counter()
        reader = _Reader(outcome)
        try:
            status, text = await self._connections.post(self.load.path, body, reader.feed)
            if status != 200:
                outcome.error = f"{status}: {_message(text.decode(errors='replace'))}"
            elif outcome.error is None:
                reader.finish()
        except self._failures as error:
            outcome.error = outcome.error or self._reason(error)
        return outcome

    def _reason(self, error: Exception) -> str:
        if isinstance(error, self._httpx.HTTPStatusError):
            return f"{error.response.status_code}: {_message(error.response.text)}"
        text = " ".join(str(error).split())[:200]
        return f"{type(error).__name__}{': ' + text if text else ''}"


def _has_output(choice: dict[str, Any]) -> bool:
    """Whether a chunk brings output: a chat's opening role and a lone end reason do not."""
    if "delta" in choice:
        delta = choice["delta"] or {}
        return any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls"))
    return bool(choice.get("text")) or choice.get("finish_reason") is None


def _message(text: str) -> str:
    """What an error's body says, in OpenAI's shape or not."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    return " ".join(str(text).split())[:200]


class _Reader:
    """Notes when the events of an answer come that bring output."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome, self._held, self._ended = outcome, b"", False
        self._chunks, self._last = 0, outcome.start

    def feed(self, piece: bytes) -> None:
        """Take the JSON of each server-sent event up to `[DONE]`. Comments and other fields are skipped (WHATWG HTML,
        9.2.6). Raises ValueError for what is not JSON.
        """
        now = time.perf_counter()
        *events, self._held = (self._held + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
            self._ended = self._ended or data == b"[DONE]"
            if data and not self._ended and self._outcome.error is None:
                self._take(json.loads(data), now)

    def _take(self, event: dict[str, Any], now: float) -> None:
        outcome = self._outcome
        if "error" in event:
            outcome.error = f"error event: {_message(json.dumps(event))}"
            return
        usage = event.get("usage")
        if usage:
            outcome.output_tokens = int(usage.get("completion_tokens") or 0)
            outcome.prompt_len = int(usage.get("prompt_tokens") or outcome.prompt_len)
        if not any(_has_output(choice) for choice in event.get("choices") or []):
            return
        if self._chunks:
            outcome.gaps.append(now - self._last)
        else:
            outcome.ttft = now - outcome.start
        self._chunks, self._last = self._chunks + 1, now

    def finish(self) -> None:
        """The answer is complete."""
        outcome = self._outcome
        outcome.latency = self._last - outcome.start
        outcome.output_tokens = outcome.output_tokens or self._chunks
        if not self._chunks:
            outcome.error = "the stream ended without any output"


async def run(load: Load, done: Callable[[int], object] = lambda _: None) -> tuple[list[Outcome], float]:
    """Send everything and wait; `done` is called with each answer's number. (outcomes in order, seconds in all).

    One request goes first and does not count. Raises LlmxError where it fails: the server is not there, or refuses.
    """
    prompts = make_prompts(load)
    async with Client(load) as client:
        await client.find_model()
        first = await client.send(prompts[0])
        if first.error is not None:
            raise LlmxError(f"{load.base_url}{load.path} does not answer: {first.error}")
        gate = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else contextlib.nullcontext()

        async def one(prompt: Prompt) -> Outcome:
            async with gate:
                outcome = await client.send(prompt)
            done(1)
            return outcome

        begin = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for prompt, at in zip(prompts, arrivals(load), strict=True):
                wait = begin + at - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                tasks.append(group.create_task(one(prompt)))
        return [task.result() for task in tasks], time.perf_counter() - begin


def arrivals(load: Load) -> Sequence[float]:
    """Seconds from the beginning at which requests are sent."""
    if not np.isfinite(load.request_rate):
        return [0.0] * load.num_prompts
    gaps = np.random.default_rng([load.seed, 1]).exponential(1.0 / load.request_rate, load.num_prompts)
    gaps[0] = 0.0
    return [float(at) for at in np.cumsum(gaps)]
