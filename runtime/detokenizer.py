"""Text of a growing list of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from llmx.runtime.tokenizer import Tokenizer, clean_up_spaces

REPLACEMENT = "\ufffd"


def _clean_up_cut(text: str) -> int:
    """Length of the part of `text` whose clean-up does not depend on what follows.

    A clean-up only deletes spaces, so a match across the cut needs, before the cut, a space followed by nothing but the
    characters inside of a pattern.
    """
    at = text.find(" ", len(text.rstrip(" 'nvr")))
    return len(text) if at < 0 else at


class IncrementalDetokenizer:
    """Text of a growing list of tokens, emitted as soon as later tokens cannot change it.

    The pieces add up to what decoding prompt and output adds to decoding the prompt, so a word that continues the
    prompt keeps its leading space. A character that the prompt's last tokens begin and the output completes belongs to
    the output. Work and memory per token do not grow with the output.

    One case differs from decoding the whole text. Of a run of byte tokens (`<0xE2>`) that is not valid UTF-8,
    tokenizers turns every byte into U+FFFD, also those of complete characters before the fault. These are shown as soon
    as they are complete and cannot be taken back; only the run's other bytes become U+FFFD.
    """

    _CONTEXT = 6  # prompt tokens that are looked at: enough for a split character and a word boundary

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        keep_special_tokens: Sequence[int] = (),
    ) -> None:
        """`keep_special_tokens`: ids that stay in the text although special tokens are skipped."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids.difference(keep_special_tokens) if skip_special_tokens else frozenset()
        self._cleans = tokenizer.cleans_up_spaces
        self._held = ""  # uncleaned text that a later piece may still change
        byte_level = tokenizer.decoder_steps in (["ByteLevel"], ["ByteLevel", "Fuse"])
        self._text: _RawText = _ByteLevelText(tokenizer) if byte_level else _WindowText(tokenizer)
        self._plain = self._text if isinstance(self._text, _ByteLevelText) and not self._cleans else None
        context: list[int] = []
        for token_id in reversed(prompt_ids):
            # Not cut inside a run of byte tokens: whether it is valid depends on its beginning.
            if len(context) >= self._CONTEXT and (byte_level or tokenizer.byte_fallback(context[-1]) is None):
                break
            if token_id not in self._skipped and tokenizer.token(token_id):
                context.append(token_id)
        for token_id in reversed(context):
            self._text.push(token_id)
        self._text.begin_output()

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, possibly ""."""
        if self._plain is not None and self._plain.whole and token_id not in self._skipped:
            text = self._tokenizer.whole_text(token_id)
            if text:
                return text
        if token_id in self._skipped or not self._tokenizer.token(token_id):
            return ""
        return self._clean(self._text.push(token_id))

    def finish(self) -> str:
        """The end of the output: whatever was still held back, broken characters as U+FFFD."""
        return self._clean(self._text.finish(), last=True)

    def _clean(self, text: str, last: bool = False) -> str:
        if not self._cleans:
            return text
        text = self._held + text
        cut = len(text) if last else _clean_up_cut(text)
        self._held = text[cut:]
        return clean_up_spaces(text[:cut])


class _RawText(Protocol):
    """Text of tokens none of which is skipped, before the clean-up of spaces."""

    def push(self, token_id: int) -> str: ...

    def begin_output(self) -> None:
        """What was pushed so far is the prompt: U+FFFD for a character that it leaves broken is its own."""
        ...

    def finish(self) -> str: ...


class _ByteLevelText:
    """Tokens are bytes: an incremental UTF-8 decoder is exact. Python and Rust replace the same "maximal subparts" of
    an invalid sequence by one U+FFFD each (Unicode 16, section 3.9).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.byte_level
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._owed = False  # the prompt ends inside a character, and showed it as U+FFFD
        #: Whether what was pushed so far ends with a whole character.
        self.whole = True

    def push(self, token_id: int) -> str:
        text = self._emit(self._decoder.decode(self._bytes_of(token_id)))
        self.whole = not self._owed and not self._decoder.getstate()[0]
        return text

    def begin_output(self) -> None:
        self._owed = bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        return self._emit(self._decoder.decode(b"", True))

    def _emit(self, text: str) -> str:
        if self._owed and text:
            self._owed = False
            return text.removeprefix(REPLACEMENT)
        return text


class _WindowText:
    """Any other decoder: decode a window of recent tokens, and cut off the text that its context had alone.

    Invariant: all text of the tokens before `pending` was returned, and `shown` is the text of `context` alone, the
    tokens just before `pending`. Decoders treat the first token of a text differently (its leading space), which is
    why there is a context, and why it is replaced only when new text came.

    Byte tokens are followed byte by byte, as the text of an incomplete run says nothing: `run` decodes the present
    run, or is None outside of one; `broken` says that it holds a fault, so that each further byte is one U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._falls_back = "ByteFallback" in tokenizer.decoder_steps
        self._lossy = "ByteLevel" in tokenizer.decoder_steps  # beside other steps: then U+FFFD may be half a character
        self._context: list[int] = []
        self._shown = ""
        self._pending: list[int] = []
        self._run: codecs.IncrementalDecoder | None = None
        self._broken = False
        self._broken_at = 0  # characters that `pending` had when the prompt ended, the last of them U+FFFD
        self._owed = 0  # bytes among `pending` that the prompt showed as U+FFFD

    def push(self, token_id: int) -> str:
        byte = self._tokenizer.byte_fallback(token_id) if self._falls_back else None
        if byte is None:
            before = self._end_run()
            self._pending.append(token_id)
            return before + self._new_text()
        if self._run is None:
            self._run = codecs.getincrementaldecoder("utf-8")("strict")
        self._pending.append(token_id)
        if not self._broken:
            try:
                complete = self._run.decode(bytes([byte]))
            except UnicodeDecodeError:
                self._broken = True
            else:
                return self._new_text() if complete else ""
        return self._replace_pending_bytes()

    def begin_output(self) -> None:
        self._owed = self._pending_bytes() if self._incomplete() else 0
        if self._lossy and self._pending:
            text = self._tokenizer.decode_raw([*self._context, *self._pending], skip_special_tokens=False)
            self._broken_at = len(text) - len(self._shown)

    def finish(self) -> str:
        text = self._end_run()
        return text + self._new_text(last=True)

    def _new_text(self, last: bool = False) -> str:
        """Text of `pending`, which becomes the context; "" where it has none yet."""
        text = self._tokenizer.decode_raw([*self._context, *self._pending], skip_special_tokens=False)
        if len(text) <= len(self._shown) or (self._lossy and not last and text.endswith(REPLACEMENT)):
            return ""
        new = text[len(self._shown) :]
        if self._broken_at and (new[: self._broken_at].endswith(REPLACEMENT) or not new[self._broken_at :]):
            new = new[self._broken_at :]  # the prompt showed these as broken, and nothing completed them
        self._broken_at = 0
        self._advance(self._pending)
        return new

    def _advance(self, context: list[int]) -> None:
        self._context, self._pending, self._owed = context, [], 0
        self._shown = self._tokenizer.decode_raw(context, skip_special_tokens=False)

    def _end_run(self) -> str:
        """The present run of byte tokens is over: U+FFFD for each byte of a character that it leaves incomplete."""
        text = self._replace_pending_bytes() if self._incomplete() else ""
        self._run, self._broken = None, False
        return text

    def _replace_pending_bytes(self) -> str:
        count = self._pending_bytes() - self._owed
        self._advance(self._pending[-1:])  # any byte token will do as the context of what follows the run
        return REPLACEMENT * count

    def _incomplete(self) -> bool:
        """Whether the present run is valid so far and ends inside a character."""
        return self._run is not None and not self._broken and bool(self._run.getstate()[0])

    def _pending_bytes(self) -> int:
        return sum(self._tokenizer.byte_fallback(i) is not None for i in self._pending)
