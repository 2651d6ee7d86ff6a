"""What comes back: vLLM's names, plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmx.runtime.chat_output import ChatDelta, ChatMessage


@dataclass(frozen=True)
class Logprob:
    """`logprob` (natural) under the model's own distribution, before any filter; `rank` 1 is the most likely token."""

    logprob: float
    rank: int | None
    decoded_token: str


#: Log-probabilities at one position: token id -> Logprob, for the token that stands there and the most likely ones.
TokenLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One continuation. `logprobs` has one entry for each of `token_ids`, where asked for.

    `finish_reason`: "stop" | "length" | "abort" | None while it runs. `stop_reason`: the stop string or the id of
    `stop_token_ids` that ended it, "max_time" where that did ("length"); None for the model's own end token. `message` is what `LLM.chat` makes of the text.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    message: ChatMessage | None = None
    score: float | None = None  # of a beam search: cumulative_logprob / length ** length_penalty


@dataclass
class RequestMetrics:
    """Times in seconds on one monotonic clock; 0.0 until reached. `num_output_tokens` counts all continuations."""

    arrival: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    finished: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_drafted: int = 0  # tokens that speculation guessed
    num_accepted: int = 0  # those of them that stood
    num_verifications: int = 0  # passes that judged guesses
    num_preemptions: int = 0  # times that a continuation lost its slot, and went on later
    num_cached_tokens: int = 0  # of the prompt's, those whose state was not computed again

    @property
    def queue_time(self) -> float:
        """Seconds from arrival until the request was scheduled; 0 before that."""
        return _between(self.arrival, self.scheduled)

    @property
    def prefill_time(self) -> float:
        """Seconds from scheduling to the first token; 0 before that."""
        return _between(self.scheduled, self.first_token)

    @property
    def ttft(self) -> float:
        """Time to first token: seconds from arrival; 0 before that."""
        return _between(self.arrival, self.first_token)

    @property
    def total_time(self) -> float:
        """Seconds from arrival to the end; 0 before that."""
        return _between(self.arrival, self.finished)

    @property
    def tpot(self) -> float:
        """Time per output token: seconds between tokens after the first; 0 where there are none."""
        later = self.num_output_tokens - 1
        return _between(self.first_token, self.last_token) / later if later > 0 else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens for each pass that judged guesses: those that stood, and one more; 0 where there were none."""
        return 1 + self.num_accepted / self.num_verifications if self.num_verifications else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Output tokens after the first over the time they took; 0 where there are none."""
        return 1.0 / self.tpot if self.tpot > 0 else 0.0


def _between(start: float, end: float) -> float:
    return max(end - start, 0.0)  # a time not reached yet is 0.0


@dataclass
class RequestOutput:
    """A prompt and its continuations. `prompt` is None where token ids were given.

    `prompt_logprobs`, where asked for, has one entry for each prompt token; the first is None, as nothing precedes it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    finished: bool = True
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(slots=True)  # made for every token, so not frozen: that takes three times as long
class StreamPiece:
    """New text and tokens of one continuation. The last piece of each carries `finish_reason`.

    Text trails the tokens where their text is not certain yet, so `text` may be "" and may cover earlier tokens.
    The last piece of a request carries its `metrics`. `delta` is what the piece adds to the message of `LLM.chat`.
    """

    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    metrics: RequestMetrics | None = None
    delta: ChatDelta | None = None
