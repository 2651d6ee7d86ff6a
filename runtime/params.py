"""What a request asks for."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from llmx.runtime.errors import RequestError
from llmx.runtime.structured import StructuredOutputsParams

DEFAULT_MAX_TOKENS = 256
MAX_COUNT = 2**31 - 1
MAX_LOGPROBS = 1024
MAX_STOPS = 256
MAX_WORDS = 4096

_GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "max_tokens": DEFAULT_MAX_TOKENS,
    "min_tokens": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_n_sigma": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": (),
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
}


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Names and meanings are vLLM's, else transformers'; docs/sampling.md has each exactly.

    None means "not given": the package's generation defaults apply, else greedy decoding with `max_tokens` 256.
    Sequences are stored as tuples (`logit_bias` as pairs), numbers as int and float, so an instance cannot change after
    it was checked.

    Args:
        n: completions per prompt (they share the prompt's prefill).
        best_of: generate so many and return the `n` of the largest `cumulative_logprob`, the best first.
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
        skip_special_tokens: leave special tokens out of the text, but for those of `keep_special_tokens`.
        include_stop_str_in_output: keep the matched stop string.
        num_beams: beams of a beam search (temperature 0 only); 1 is none. `n` of its best outputs are returned.
        length_penalty: a beam's score is its log-probability / length ** this: above 0 favours longer outputs.
        early_stopping: True ends the search once there are `num_beams` outputs, False once no running beam looks better,
            "never" once none can become better.
        prompt_logprobs: report this many most likely tokens, and the given one, at each prompt token but the first.
        typical_p: keep the tokens whose surprise is closest to the distribution's entropy, up to this probability.
        epsilon_cutoff: drop tokens less likely than this; 0 keeps all.
        eta_cutoff: the same with a cut-off that falls with the entropy; 0 keeps all.
        top_n_sigma: drop logits more than this many standard deviations below the largest; 0 keeps all.
        repetition_penalty: above 1 makes tokens of prompt and output less likely, below 1 more.
        presence_penalty: subtracted from the logits of tokens that are in the output.
        frequency_penalty: subtracted as often as a token is in the output.
        no_repeat_ngram_size: no run of this many tokens comes twice, prompt included; 0 allows all.
        logit_bias: token id -> number added to its logit.
        allowed_token_ids: nothing else may come (not even an end token).
        bad_words: strings whose tokens may not come in the output.
        bad_words_ids: lists of token ids that may not come, not even begun by the prompt (transformers').
        suppress_tokens: tokens that may not come (transformers').
        begin_suppress_tokens: tokens that may not come first (transformers').
        max_time: seconds from the request's arrival after which it ends with what it has (waiting for a slot included).
        keep_special_tokens: ids of special tokens that stay in the text (a chat format's markers).
        structured_outputs: what the output must look like: `StructuredOutputsParams`, or a mapping of its fields.

    Raises RequestError (a ValueError) naming the field and its range.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int | None = None
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
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    top_n_sigma: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_words_ids: Sequence[Sequence[int]] | None = None
    keep_special_tokens: Sequence[int] = ()
    max_time: float | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    best_of: int | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._set("n", _integer("n", self.n, 1, 256))
        for name, start, end, open_low in _NUMBERS:
            self._set(name, _number(name, getattr(self, name), start, end, open_low))
        for name, low, high in _OPTIONAL_INTEGERS:
            value = getattr(self, name)
            self._set(name, None if value is None else _integer(name, value, low, high))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, and is {_show(getattr(self, name))}.")
        self._set("stop", _stop(self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOPS))
        self._set("keep_special_tokens", _token_ids("keep_special_tokens", self.keep_special_tokens, MAX_COUNT))
        self._set("logit_bias", _bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_COUNT))
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids must list at least one token id, or be left out.")
        self._set("bad_words", _words(self.bad_words))
        if self.bad_words_ids is not None:
            self._set("bad_words_ids", _word_ids(self.bad_words_ids))
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            ids = getattr(self, name)
            self._set(name, None if ids is None else _token_ids(name, ids, MAX_COUNT))
        if self.structured_outputs is not None:
            self._set("structured_outputs", StructuredOutputsParams.of(self.structured_outputs))
        if not (self.early_stopping is None or isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise RequestError(f'early_stopping must be true, false or "never", and is {_show(self.early_stopping)}.')
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of ({self.best_of}) must not be below n ({self.n}).")
        if (self.num_beams or 1) > 1:
            self._check_beams()
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise RequestError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).")

    def _check_beams(self) -> None:
        if self.temperature:
            raise RequestError(f"num_beams ({self.num_beams}) needs temperature 0, and it is {self.temperature:g}.")
        if self.structured_outputs is not None:
            raise RequestError("num_beams and structured_outputs do not go together; leave one of them out.")
        if self.n > (self.num_beams or 1):
            raise RequestError(f"n ({self.n}) must not exceed num_beams ({self.num_beams}).")
        if self.num_samples > self.n:
            raise RequestError("num_beams and best_of do not go together; leave one of them out.")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen for everyone else

    @property
    def num_samples(self) -> int:
        """Outputs that are drawn, of which `n` are returned."""
        return self.best_of or self.n

    @property
    def num_sequences(self) -> int:
        """Continuations of a request: beams, or outputs that are drawn."""
        return self.num_beams if self.num_beams is not None and self.num_beams > 1 else self.num_samples

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list, in the order given."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def resolved(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """This request with every None that has a default filled in: from `defaults`, else greedy.

        Beams go before a default temperature, and a request's temperature, or a greater n, before default beams.
        Keys of `defaults` that are no field, or whose value is None, are passed over. `seed`, `stop`, `logprobs` and
        `prompt_logprobs` stay None where neither side sets them: for these None is a value. Raises RequestError where
        the combination is invalid.
        """
        names = {f.name for f in fields(self)}
        given = {name: value for name, value in defaults.items() if name in names and value is not None}
        if self.min_tokens is None and "min_tokens" in given:  # a default does not contradict a request
            longest = self.max_tokens or given.get("max_tokens") or DEFAULT_MAX_TOKENS
            given["min_tokens"] = min(given["min_tokens"], longest)
        beams = given.get("num_beams", 1) if self.num_beams is None else self.num_beams
        sampled = self.temperature or self.num_samples > self.n or self.n > beams
        if self.num_beams is None and (sampled or self.structured_outputs is not None):
            given["num_beams"] = 1  # who asks for samples gets them
        elif beams > 1:
            given["temperature"] = 0.0
        return replace(self, **{k: v for k, v in {**_GREEDY, **given}.items() if getattr(self, k) is None})


_NUMBERS = (
    ("temperature", 0.0, 100.0, False),
    ("top_p", 0.0, 1.0, True),
    ("min_p", 0.0, 1.0, False),
    ("typical_p", 0.0, 1.0, True),
    ("epsilon_cutoff", 0.0, 1.0, False),
    ("eta_cutoff", 0.0, 1.0, False),
    ("top_n_sigma", 0.0, 1000.0, False),
    ("repetition_penalty", 0.0, 100.0, True),
    ("presence_penalty", -2.0, 2.0, False),
    ("frequency_penalty", -2.0, 2.0, False),
    ("length_penalty", -100.0, 100.0, False),
    ("max_time", 0.0, 1e9, True),
)
_OPTIONAL_INTEGERS = (
    ("max_tokens", 1, MAX_COUNT),
    ("min_tokens", 0, MAX_COUNT),
    ("top_k", -1, MAX_COUNT),
    ("num_beams", 1, 64),
    ("best_of", 1, 256),
    ("seed", 0, 2**64 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("no_repeat_ngram_size", 0, MAX_COUNT),
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


def _items(name: str, value: Any, what: str, most: int) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list of {what}, and is {_show(value)}.")
    items = tuple(value)
    if len(items) > most:
        raise RequestError(f"{name} must list at most {most} {what}, and lists {len(items)}.")
    return items


def _token_ids(name: str, value: Any, most: int) -> tuple[int, ...]:
    return tuple(_integer(f"each of {name}", token, 0, MAX_COUNT) for token in _items(name, value, "token ids", most))


def _words(value: Any) -> tuple[str, ...]:
    words = _items("bad_words", value, "strings", MAX_WORDS)
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise RequestError(f"each of bad_words must be a string that is not blank, and is {_show(word)}.")
    return words


def _word_ids(value: Any) -> tuple[tuple[int, ...], ...]:
    words = _items("bad_words_ids", value, "lists of token ids", MAX_WORDS)
    ids = tuple(_token_ids("each list of bad_words_ids", word, MAX_WORDS) for word in words)
    if not all(ids):
        raise RequestError("each of bad_words_ids must list at least one token id.")
    return ids


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    """(token, bias) pairs, ascending. Keys may be decimal strings, as JSON has them."""
    try:
        pairs = list(value.items()) if isinstance(value, Mapping) else [(token, bias) for token, bias in value or ()]
    except (TypeError, ValueError):
        raise RequestError(f"logit_bias must map token ids to numbers, and is {_show(value)}.") from None
    found: dict[int, float] = {}
    for token, bias in pairs:
        key = int(token) if isinstance(token, str) and token.isascii() and token.isdigit() else token
        number = _number("each value of logit_bias", bias, -100.0, 100.0)
        if number is None:
            raise RequestError("each value of logit_bias must be a number from -100 to 100, and is None.")
        found[_integer("each key of logit_bias", key, 0, MAX_COUNT)] = number
    return tuple(sorted(found.items()))


def _show(value: Any) -> str:
    """`value` for a message: short, on one line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}…"
