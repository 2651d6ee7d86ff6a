"""LLM's methods that score text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np
from llmx.runtime.backend import score_tokens
from llmx.runtime.errors import ContextLengthError, FamilyError, RequestError
from llmx.runtime.llm_base import Loaded
from llmx.runtime.prompts import Prompt, as_list

if TYPE_CHECKING:
    from llmx.runtime.perplexity import Perplexity


class ScoringMethods(Loaded):
    """Log-probabilities of given texts."""

    def score(self, prompts: Prompt | Seq[Prompt]) -> list[list[float]]:
        """Natural-log probability of each token given those before it; the first has none, so n tokens give n - 1.

        Raises RequestError for a prompt without tokens, ContextLengthError for more than `max_length` of them.
        """
        self._need_scores()
        results = []
        for prompt in as_list(prompts):
            ids = self._encode(prompt)
            self.engine.check_ids(ids)
            if len(ids) > self.max_length:
                raise ContextLengthError(
                    f"The text has {len(ids)} tokens and the context holds {self.max_length}; score shorter pieces."
                )
            results.append(self._score(ids, 1))
        return results

    def perplexity(self, text: Prompt, *, stride: int | None = None, max_length: int | None = None) -> Perplexity:
        """Perplexity of a text of any length, with a window of `max_length` tokens (None: the whole context) that moves by
        `stride` (None: half a window) and scores what no window before it scored.

        Raises RequestError for fewer than two tokens, a window beyond the context, or a stride beyond the window.
        """
        from llmx.runtime.perplexity import sliding

        self._need_scores()
        ids = self._encode(text)
        self.engine.check_ids(ids)
        length = self.max_length if max_length is None else max_length
        if not 2 <= length <= self.max_length:
            raise RequestError(f"max_length must lie between 2 and {self.max_length}, and is {length}.")
        step = max(1, length // 2) if stride is None else stride
        if not 1 <= step <= length:
            raise RequestError(f"stride must lie between 1 and the window's {length} tokens, and is {step}.")
        if len(ids) < 2:
            raise RequestError("The text has one token, and perplexity needs two; give a longer text.")
        return sliding(ids, length, step, self._score)

    def _need_scores(self) -> None:
        self.need_generation()
        if self.manifest.seq2seq is not None:
            raise FamilyError(f"{self.folder} is an encoder-decoder, whose prompts have no probabilities to score.")

    def _score(self, ids: list[int], first: int) -> list[float]:
        chunk = self.prefill_chunk if self.backend.chunked else self.max_length
        with self._driver.at_rest():
            return score_tokens(self.backend, np.array(ids, np.int64), chunk, first)
