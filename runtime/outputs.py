"""What comes back: vLLM's names, plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """`logprob` under the model's own distribution; `rank` 1 is the most likely token."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass
class CompletionOutput:
    """One continuation. `finish_reason`: "stop" | "length" | "abort". `stop_reason`: the stop string or token id."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestMetrics:
    """Times in seconds on one monotonic clock; 0.0 until reached."""

    arrival: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    finished: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_token - self.arrival

    @property
    def decode_tokens_per_second(self) -> float:
        """Output tokens after the first over the time they took; 0 where there are none."""
        elapsed = self.last_token - self.first_token
        return (self.num_output_tokens - 1) / elapsed if elapsed > 0 and self.num_output_tokens > 1 else 0.0


@dataclass
class RequestOutput:
    """A prompt and its continuations. `prompt` is None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    finished: bool = True


@dataclass(frozen=True)
class StreamPiece:
    """New text and tokens of one continuation. The last piece of each carries `finish_reason`."""

    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    metrics: RequestMetrics | None = None
