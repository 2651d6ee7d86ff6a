"""Grammars of structured outputs, by llguidance: which tokens may come next, and which must.

llguidance (https://github.com/guidance-ai/llguidance) compiles a grammar against the tokenizer's vocabulary; its
matcher follows one output. Needs the `structured` extra.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict, deque
from typing import Any

import numpy as np
from llmx.runtime.errors import MissingDependencyError, RequestError
from llmx.runtime.structured import StructuredOutputsParams
from llmx.runtime.tokenizer import Tokenizer

_KEPT = 32  # compiled grammars
_TAKEN_BACK = 64  # tokens whose masks are remembered, should they be taken back and come again

#: Between JSON's signs: one space, or a line break and its indentation. Without a bound a small model may never end.
_SPACES = r" |\r?\n[ \t]{0,20}"


class Grammar:
    """Where one output stands in its grammar.

    Invariant: the matcher has consumed the output's first `_done` tokens. `_forced` are tokens that must come next, in
    this order, as far as they are known; None: nobody has asked yet. `_mask` is what may come after these `_done` tokens, or None.
    `_past` are the last tokens with the masks before them, `_ahead` tokens that may come with the masks after them, in order:
    guesses are looked at twice, when they are made and when they are judged.
    """

    def __init__(self, matcher: Any, vocab_size: int, num_words: int) -> None:
        """`vocab_size`: tokens of the model; `num_words`: of llguidance's vocabulary, at least as many."""
        self._matcher = matcher
        self._vocab_size, self._num_words = vocab_size, num_words
        self._bits = np.zeros((num_words + 31) // 32, np.int32)
        self._done = 0
        self._wrong = False  # a token was consumed that the grammar has no place for
        self._forced: list[int] | None = None
        self._mask: np.ndarray | None = None
        self._past: deque[tuple[int, np.ndarray | None]] = deque(maxlen=_TAKEN_BACK)
        self._ahead: deque[tuple[int, np.ndarray | None]] = deque()

    def follow(self, tokens: list[int], start: int) -> None:
        """Consume what came since, of the output `tokens[start:]`."""
        for token in tokens[start + self._done :]:
            if self._wrong:
                return
            known = self._forced
            self._forced = known[1:] if known and known[0] == token and len(known) > 1 else None
            self._wrong = not self._matcher.try_consume_tokens([token])
            self._done += not self._wrong
            self._past.append((token, self._mask))
            self._mask = None
            if self._ahead:
                expected, mask = self._ahead.popleft()
                if expected == token:
                    self._mask = mask
                else:
                    self._ahead.clear()
            self._check()

    def undo(self, length: int) -> None:
        """Forget all tokens of the output but the first `length`."""
        if self._wrong:  # the last token was not consumed
            self._wrong = False
            _, self._mask = self._past.pop()
            self._ahead.clear()
        if length >= self._done:
            return
        self._forced = None
        for _ in range(min(self._done - length, len(self._past))):
            token, before = self._past.pop()
            self._ahead.appendleft((token, self._mask))
            self._mask = before
        if not self._past:
            self._mask = None
            self._ahead.clear()
        self._matcher.rollback(self._done - length)
        self._done = length

    def fork(self) -> Grammar:
        twin = Grammar(self._matcher.deep_copy(), self._vocab_size, self._num_words)
        twin._done, twin._wrong, twin._forced, twin._mask = self._done, self._wrong, self._forced, self._mask
        twin._past, twin._ahead = self._past.copy(), self._ahead.copy()
        return twin

    @property
    def finished(self) -> bool:
        """Whether the output is complete and nothing can follow."""
        return not self._wrong and bool(self._matcher.is_stopped())

    def forced(self) -> list[int]:
        """Tokens that are certain to come next: [] where there is a choice."""
        if self._forced is None:
            forced = [] if self._wrong or self._matcher.is_stopped() else list(self._matcher.compute_ff_tokens())
            self._check()
            self._forced = forced if max(forced, default=0) < self._vocab_size else []
        return self._forced

    def mask(self) -> np.ndarray:
        """bool [vocab]: which tokens may come next, the end tokens where the output may end here."""
        if self._wrong:
            return np.zeros(self._vocab_size, bool)
        if self._mask is None:
            self.prepare()
            self._check()
            assert self._mask is not None
        return self._mask

    def prepare_along(self, tokens: list[int]) -> None:
        """`prepare`, and the masks after each of `tokens` as far as the grammar has a place for them, should they come next."""
        if self._mask is None:
            self.prepare()
        twin, ahead = self.fork(), deque[tuple[int, np.ndarray | None]]()
        for token in tokens:
            if twin._mask is None or not twin._mask[token]:
                break
            try:
                twin.follow([token], -twin._done)
                if twin._mask is None and not twin.finished and not twin.forced():
                    twin.prepare()
            except RequestError:  # whoever comes so far meets it again
                break
            ahead.append((token, twin._mask))
        self._ahead = ahead

    def prepare(self) -> None:
        """Compute `mask`, in whichever thread has the time. What is wrong with it, `mask` says."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if not self._matcher.is_error():
            bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
            self._mask = bits[: self._vocab_size].view(bool)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"The grammar of structured_outputs cannot be followed any further: {_line(self._matcher.get_error())}."
            )


class GrammarCompiler:
    """Compiles grammars for one vocabulary. May be called from any thread; llguidance is imported at the first call."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._known: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()

    def warm(self) -> None:
        """Read the vocabulary, which takes 0.3 s for 128k tokens and holds the interpreter, before anybody waits. Without
        llguidance, or for a tokenizer that it cannot use, a request says so.
        """
        with self._lock, contextlib.suppress(ImportError, RequestError):
            self._vocabulary = self._vocabulary or self._make_vocabulary()

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar at the beginning of an output. Raises RequestError where llguidance cannot compile it,
        MissingDependencyError without llguidance.
        """
        with self._lock:
            matcher = self._known.pop(params, None)
            if matcher is None:
                matcher = self._matcher(params)
            self._known[params] = matcher  # most recently used last
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
            return Grammar(matcher.deep_copy(), self._vocab_size, self._vocabulary.vocab_size)

    def _matcher(self, params: StructuredOutputsParams) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise MissingDependencyError(
                'structured_outputs needs llguidance: pip install "llmx[structured]".'
            ) from None
        vocabulary = self._vocabulary = self._vocabulary or self._make_vocabulary()
        try:
            grammar = _grammar(params)
            is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
        except ValueError as error:
            is_error, messages = True, [str(error)]
        if is_error:
            raise RequestError(f"structured_outputs cannot be compiled: {_line(messages[0])}.")
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"structured_outputs cannot be compiled: {_line(matcher.get_error())}.")
        return matcher

    def _make_vocabulary(self) -> Any:
        from llguidance import LLTokenizer

        source = self._tokenizer.source()
        size = max(self._vocab_size, self._tokenizer.vocab_size)
        ends = [token for token in self._tokenizer.eos_token_ids if token < size]
        try:
            if source is None:
                raise ValueError("it has no tokenizer.json")
            return LLTokenizer(source, n_vocab=size, eos_token=ends or None)
        except ValueError as error:
            raise RequestError(
                f"This package's tokenizer cannot be used with structured_outputs: {_line(str(error))}."
            ) from None


def _grammar(params: StructuredOutputsParams) -> str:
    """llguidance's form of `params`. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        quoted = (json.dumps(choice, ensure_ascii=False) for choice in params.choice)
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(quoted)}")
    if params.grammar is not None:
        return grammar_from("grammar", params.grammar)
    schema = {"type": "object"} if params.json is None else json.loads(str(params.json))
    if params.disable_additional_properties:
        schema = _closed(schema)
    spaces: dict[str, Any] = {"whitespace_pattern": params.whitespace_pattern or _SPACES}
    if params.disable_any_whitespace:
        spaces = {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), defaults=spaces)


def _closed(schema: Any) -> Any:
    """`schema` with no additional properties in the objects that name theirs."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


def _line(text: str) -> str:
    """The beginning of a message of several lines, on one."""
    return " ".join(text.split())[:160].rstrip(".")
