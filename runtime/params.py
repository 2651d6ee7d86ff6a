"""What a request asks for."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from llmx.runtime.errors import RequestError

DEFAULT_MAX_TOKENS = 256
MAX_COUNT = 2**31 - 1
MAX_LOGPROBS = 1024
MAX_STOPS = 256

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
    Sequences are stored as tuples, numbers as int and float, so an instance cannot change after it was checked.

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
        prompt_logprobs: report this many most likely tokens, and the given one, at each prompt token but the first.

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
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._set("n", _integer("n", self.n, 1, 256))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, 0, MAX_COUNT))
        self._set("temperature", _number("temperature", self.temperature, 0.0, 100.0))
        self._set("top_p", _number("top_p", self.top_p, 0.0, 1.0, open_low=True))
        self._set("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        for name, low, high in _OPTIONAL_INTEGERS:
            value = getattr(self, name)
            self._set(name, None if value is None else _integer(name, value, low, high))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, and is {_show(getattr(self, name))}.")
        self._set("stop", _stop(self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen for everyone else

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list, in the order given."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def resolved(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """This request with every None that has a default filled in: from `defaults`, else greedy.

        Keys of `defaults` that are no field, or whose value is None, are passed over. `seed`, `stop`, `logprobs` and
        `prompt_logprobs` stay None where neither side sets them: for these None is a value. Raises RequestError where
        the combination is invalid.
        """
        names = {f.name for f in fields(self)}
        given = {name: value for name, value in defaults.items() if name in names and value is not None}
        return replace(self, **{k: v for k, v in {**_GREEDY, **given}.items() if getattr(self, k) is None})


_OPTIONAL_INTEGERS = (
    ("max_tokens", 1, MAX_COUNT),
    ("top_k", -1, MAX_COUNT),
    ("seed", 0, 2**64 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)  # numpy's integers pass, floats don't
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, and is {_show(value)}.")
    return number


def _number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> float | None:
    if value is None:
        return None
    number = math.nan  # fails every comparison
    if isinstance(value, Real) and not isinstance(value, bool):  # numpy's floats are Real
        try:
            number = float(value)
        except OverflowError:  # an integer beyond float's range
            number = math.inf
    if not low <= number <= high or (open_low and number == low):
        start = f"above {low:g}, up to" if open_low else f"from {low:g} to"
        raise RequestError(f"{name} must be a number {start} {high:g}, and is {_show(value)}.")
    return number


def _stop(value: Any) -> str | tuple[str, ...] | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        texts = tuple(value)
        if len(texts) <= MAX_STOPS and all(isinstance(text, str) and text for text in texts):
            return texts or None
    raise RequestError(
        f"stop must be a non-empty string or a list of at most {MAX_STOPS} of them, and is {_show(value)}."
    )


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list of token ids, and is {_show(value)}.")
    ids = tuple(value)
    if len(ids) > MAX_STOPS:
        raise RequestError(f"{name} must list at most {MAX_STOPS} token ids, and lists {len(ids)}.")
    return tuple(_integer(f"each of {name}", token, 0, MAX_COUNT) for token in ids)


def _show(value: Any) -> str:
    """`value` for a message: short, on one line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}…"
