"""What a request asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from llmx.runtime.errors import RequestError

DEFAULT_MAX_TOKENS = 256
_GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "max_tokens": DEFAULT_MAX_TOKENS,
}


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Names and meanings are vLLM's.

    None means "not given": the package's generation defaults apply, else greedy decoding with `max_tokens` 256.

    Args:
        n: completions per prompt (they share the prompt's prefill).
        max_tokens: most tokens to generate.
        min_tokens: end tokens are masked and stop strings ignored until this many tokens exist.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this.
        min_p: drop tokens less likely than this part of the most likely one's probability.
        seed: makes the request's draws repeatable, whatever else is in the batch.
        stop: strings that end the output (and are not part of it).
        stop_token_ids: tokens that end the output, besides the model's own end tokens.
        ignore_eos: go on past the model's end tokens.
        logprobs: report this many most likely tokens at each step, and the chosen one (0: the chosen one alone).
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the matched stop string.

    Raises RequestError (a ValueError) naming the field and its range.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, 256)
        _integer("max_tokens", self.max_tokens, 1, None)
        _integer("min_tokens", self.min_tokens, 0, None)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, -1, None)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("seed", self.seed, 0, 2**64 - 1)
        _integer("logprobs", self.logprobs, 0, 1024)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, and is {getattr(self, name)!r}.")
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError("stop must be a non-empty string or a list of them.")
        ids = list(self.stop_token_ids)
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise RequestError("stop_token_ids must be a list of token ids (integers from 0).")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).")

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def resolved(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """This request with every None that has a default filled in: from `defaults`, else greedy."""
        names = {f.name for f in fields(self)}
        known = {k: v for k, v in {**_GREEDY, **defaults}.items() if k in names}
        return replace(self, **{k: v for k, v in known.items() if getattr(self, k) is None})


def _integer(name: str, value: Any, low: int, high: int | None) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise RequestError(f"{name} must be a whole number {limit}, and is {value!r}.")


def _number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    if value is None:
        return
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or value > high or (open_low and value == low):
        start = f"above {low:g}" if open_low else f"from {low:g}"
        raise RequestError(f"{name} must be a number {start} to {high:g}, and is {value!r}.")
