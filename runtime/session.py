"""A conversation whose past is computed once: `LLM.session()`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.runtime.draft import common
from llmx.runtime.driver import PieceStream
from llmx.runtime.errors import ContextLengthError, FamilyError, RequestError
from llmx.runtime.outputs import RequestOutput, StreamPiece
from llmx.runtime.params import SamplingParams
from llmx.runtime.parked_state import ParkedState, make_parked
from llmx.runtime.prompts import Prompt
from llmx.runtime.session_file import load_session, save_session

if TYPE_CHECKING:
    from llmx.runtime.backend import Backend
    from llmx.runtime.conversation import ChatRequest
    from llmx.runtime.llm import LLM
    from llmx.runtime.scheduler import Request, Sequence


class Session:
    """Tokens and the state that the model has made of them.

    While it generates, its state is in a slot, which belongs to the request as any other's does. Between requests it
    holds no slot: its state is parked on the host, owned by the session alone, and written back when the next request
    gets a slot. What is parked is never changed, so forks share it.

    One request at a time; not for several threads at once. `on_full`: what happens where the context has no room:
    "stop" ends an answer (finish_reason "length") and refuses the next one; "shift" forgets the oldest tokens but the
    first `keep_first` before an answer, and computes the state of those that stay anew, as they change their places.
    """

    def __init__(self, llm: LLM, on_full: str = "stop", keep_first: int = 0) -> None:
        if on_full not in ("stop", "shift"):
            raise RequestError(f'on_full must be "stop" or "shift", and is {on_full!r}.')
        if isinstance(keep_first, bool) or not isinstance(keep_first, int) or not 0 <= keep_first < llm.max_length - 1:
            raise RequestError(
                f"keep_first must be a whole number from 0 to {llm.max_length - 2}, and is {keep_first!r}."
            )
        llm.need_generation()
        if llm.manifest.seq2seq is not None:
            raise FamilyError(f"{llm.folder} is an encoder-decoder, which answers each source by itself; use generate.")
        self.on_full, self.keep_first = on_full, keep_first
        self._llm = llm
        self._tokens: list[int] = []
        self._dropped: list[int] = []  # by shifts, after the first `keep_first`
        self._parked: ParkedState = make_parked(llm.backend)
        self._request: Request | None = None

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> list[int]:
        """The tokens of the context, a copy."""
        return list(self._tokens)

    @property
    def text(self) -> str:
        """All that was said, forgotten tokens and special ones included."""
        return self._llm.tokenizer.decode_raw(self._all_tokens(), skip_special_tokens=False)

    @property
    def num_cached(self) -> int:
        """Tokens whose state is there; the next request computes the others."""
        return self._parked.length

    def __len__(self) -> int:
        return len(self._tokens)

    def _all_tokens(self) -> list[int]:
        first = self.keep_first
        return self._tokens[:first] + self._dropped + self._tokens[first:] if self._dropped else self._tokens

    # -- what changes it ----------------------------------------------------------------------------------------------

    def append(self, prompt: Prompt) -> Session:
        """Add text or token ids; nothing is computed yet. A first text gets the special tokens that begin a prompt."""
        self._settle()
        if isinstance(prompt, str):
            ids = self._llm.tokenizer.encode(prompt, add_special_tokens=not self._tokens)
        else:
            ids = self._llm._encode(prompt)
        if ids:
            self._llm.engine.check_ids(ids)
        self._tokens += ids
        return self

    def rewind(self, position: int) -> Session:
        """Forget the tokens from `position` on. Where the state is a recurrence, it goes back to the end of an earlier
        answer, and the tokens between there and `position` are computed again.
        """
        self._settle()
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position <= len(self._tokens):
            raise RequestError(f"A position must be a whole number from 0 to {len(self._tokens)}, and is {position!r}.")
        if position < self.keep_first:
            self._dropped = []
        del self._tokens[position:]
        self._parked.cut(position)
        return self

    def fork(self) -> Session:
        """Another session that goes on from here by itself; the state so far is shared."""
        self._settle()
        twin = Session(self._llm, self.on_full, self.keep_first)
        twin._tokens, twin._dropped, twin._parked = self.tokens, list(self._dropped), self._parked.copy()
        return twin

    # -- answers ------------------------------------------------------------------------------------------------------

    def generate(self, params: SamplingParams | None = None) -> RequestOutput:
        """Continue; the output becomes part of the session. Raises ContextLengthError where the context is full."""
        request = self._submit(params, None)
        try:
            return self._llm._finished([request])[0]
        finally:
            self._llm._abandon([request])

    def stream(self, params: SamplingParams | None = None) -> PieceStream:
        """Continue, yielding text as soon as it is certain. What came before the stream is closed stays in the session."""
        pieces: deque[StreamPiece] = deque()
        return PieceStream(self._llm._driver, self._submit(params, pieces.append), pieces)

    def chat(
        self,
        messages: Seq[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        **arguments: Any,
    ) -> Any:
        """Answer a conversation as `LLM.chat` does, computing no more of it than is new.

        `messages` are the whole conversation. Where the template's text begins with what the session holds, only the
        rest is added; where it does not (a message was changed, or a template that rewrites the past), the session goes
        back to where the two part.
        """
        asked = self.ask(messages, **arguments)
        if not stream:
            return asked.parsed(self.generate(asked.params(params)))
        pieces: deque[StreamPiece] = deque()
        read = asked.reader()
        request = self._submit(asked.params(params), lambda piece: pieces.append(read(piece)))
        return PieceStream(self._llm._driver, request, pieces)

    def ask(self, messages: Seq[Mapping[str, Any]], **arguments: Any) -> ChatRequest:
        """Make the session hold the conversation as its template writes it; what `chat` goes on from."""
        asked = self._llm.chat_request(messages, **arguments)
        self._follow(asked.prompt)
        return asked

    def _follow(self, text: str) -> None:
        """Make the session hold `text`."""
        self._settle()
        tokenizer, held = self._llm.tokenizer, self.text
        if held and text.startswith(held):
            self._tokens += tokenizer.encode(text[len(held) :], add_special_tokens=False)
            return
        ids = tokenizer.encode(text, add_special_tokens=False)
        same = common(self._all_tokens(), ids)
        if self._dropped:
            same, self._dropped = min(same, self.keep_first), []
        self.rewind(same)
        self._tokens += ids[same:]

    def _submit(self, params: SamplingParams | None, emit: Callable[[StreamPiece], None] | None) -> Request:
        self._settle()
        self._llm._driver.check_usable()
        params = params or SamplingParams()
        resolved = params.resolved({**self._llm.manifest.generation, **({} if params.num_beams else {"num_beams": 1})})
        if resolved.num_samples != 1 or (resolved.num_beams or 1) != 1 or resolved.prompt_logprobs is not None:
            raise RequestError(
                "A session continues one text: leave out n, best_of, num_beams and prompt_logprobs, or fork it."
            )
        if self.on_full == "shift":
            self._make_room(resolved.max_tokens or 1)
        elif len(self._tokens) >= self._llm.max_length:
            raise ContextLengthError(
                f"The session has {len(self._tokens)} tokens and the context holds {self._llm.max_length}, one of them for "
                'the answer; rewind it, begin another, or open it with on_full="shift".'
            )
        self._request = self._llm.engine.add(None, self._tokens, resolved, emit, session=self)
        self._llm._driver.wake()
        return self._request

    def _make_room(self, wanted: int) -> None:
        """Forget the oldest tokens where the context would not hold `wanted` more, half of what may go at a time."""
        longest, first = self._llm.max_length, self.keep_first
        movable = longest - first
        wanted = min(wanted, max(movable // 2, 1))
        excess = len(self._tokens) + wanted - longest
        if excess <= 0:
            return
        end = first + min(max(excess, movable // 2), len(self._tokens) - first - 1)
        self._dropped += self._tokens[first:end]
        del self._tokens[first:end]
        self._parked.cut(first)

    def _settle(self) -> None:
        """Wait for the end of a request that was given up. Raises RequestError while one is running."""
        request = self._request
        if request is not None and not request.finished:
            if not request.cancelled:
                raise RequestError("The session is generating; read its stream to the end, or close it, first.")
            self._llm._driver.drive(lambda: request.finished)
        self._request = None

    # -- for the engine -----------------------------------------------------------------------------------------------

    def restore(self, backend: Backend, sequence: Sequence) -> int:
        """Write the parked state to the sequence's slot; how many of its tokens it is of."""
        assert sequence.slot is not None
        turn = backend.recompute_at
        if turn is not None and (self._parked.made_for <= turn) != (sequence.num_prompt <= turn):
            self._parked.cut(0)  # rotary factors of another length
        return self._parked.restore(backend, sequence.slot, sequence.num_prompt - 1)

    def keep(self, backend: Backend, sequence: Sequence) -> None:
        """Take over a sequence that ends: its tokens, and the state that its slot holds. It may have none: preempted, or still
        waiting.
        """
        self._tokens = list(sequence.tokens)
        if sequence.slot is None:
            return
        if sequence.recomputed:
            self._parked.cut(0)  # what was restored is no longer what the slot holds
        try:
            self._parked.keep(backend, sequence.slot, sequence.num_cached)
        except MemoryError:
            self._parked.cut(0)  # it is computed again

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write tokens and state to `path`, under another name first. Raises RequestError where it cannot be written."""
        self._settle()
        settings = {"on_full": self.on_full, "keep_first": self.keep_first}
        save_session(Path(path), self._llm, self._tokens, self._dropped, settings, self._parked)

    @staticmethod
    def load(llm: LLM, path: str | Path) -> Session:
        """A saved session. Raises RequestError for a file of another package or a damaged one, ContextLengthError where
        `llm` has a shorter context.
        """
        tokens, dropped, settings, parked = load_session(Path(path), llm)
        session = Session(llm, **settings)
        session._tokens, session._dropped, session._parked = tokens, dropped, parked
        return session
