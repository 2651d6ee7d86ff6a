"""Masks of grammars, computed while the device works."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmx.runtime.errors import LlmxError
from llmx.runtime.grammar import Grammar
from llmx.runtime.history import History

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor


class MasksAhead:
    """A thread that computes which tokens may come after those that a running step is about to say something of.

    What the grammar allows depends on the tokens so far alone, and these are known before the step runs. onnxruntime and
    llguidance both let go of the interpreter lock. Owns its thread, which exists from the first grammar on.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    @contextmanager
    def during(self, histories: Sequence[History], guesses: Sequence[list[int]] = ()) -> Iterator[None]:
        """Compute the masks of those of `histories` that have a grammar while the block runs; with `guesses`, one list of
        tokens for each history, those after each guess as well. Nothing else may look at these histories meanwhile.
        """
        pairs = zip(histories, guesses or [[]] * len(histories), strict=True)
        work_for = [(g, tokens) for history, tokens in pairs if (g := _undecided(history)) is not None]
        if not work_for:
            yield
            return
        from concurrent.futures import ThreadPoolExecutor

        self._thread = self._thread or ThreadPoolExecutor(1, "llmx-grammar")
        work: Future[None] = self._thread.submit(_prepare, work_for)
        try:
            yield
        finally:
            work.result()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None


def _undecided(history: History) -> Grammar | None:
    """A history's grammar, where more than one token may come next."""
    try:
        grammar = history.grammar()
        return None if grammar is None or grammar.forced() or grammar.finished else grammar
    except LlmxError:  # whoever chooses the token meets it again, and ends that request alone
        return None


def _prepare(work: list[tuple[Grammar, list[int]]]) -> None:
    for grammar, tokens in work:
        grammar.prepare_along(tokens) if tokens else grammar.prepare()
