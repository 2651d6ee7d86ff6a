"""Text to token ids and back, whole and piece by piece."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from llmx.runtime.errors import PackageError, RequestError
from llmx.runtime.manifest import TokenizerInfo

REPLACEMENT = "\ufffd"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@contextlib.contextmanager
def _valid_text() -> Iterator[None]:
    try:
        yield
    except TypeError:  # also where a string holds half of a surrogate pair
        raise RequestError("A prompt must be text in valid Unicode (no lone surrogates).") from None


class Tokenizer:
    """`tokenizer.json` with the package's special tokens; encodes and decodes as transformers' fast tokenizers do."""

    def __init__(self, backend: Any, info: TokenizerInfo) -> None:
        """`backend` is a `tokenizers.Tokenizer` that neither pads nor truncates."""
        self._backend = backend
        self._truncating: dict[int, Any] = {}
        self._plain: Any = None  # a copy that knows no special tokens, made when one is needed
        self.info = info
        #: Ids that `skip_special_tokens` leaves out of the text.
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        #: Spelling of each added token, special or not.
        self.added_tokens: dict[int, str] = {i: t.content for i, t in backend.get_added_tokens_decoder().items()}
        # transformers ignores the flag for BPE: the clean-up is meant for WordPiece, and eats a BPE's real spaces.
        self.cleans_up_spaces = info.clean_up_tokenization_spaces and type(backend.model).__name__ != "BPE"
        self.decoder_steps = _decoder_steps(backend.decoder)
        self._byte_level: dict[int, bytes] = {}

    @staticmethod
    def load(folder: Path, info: TokenizerInfo) -> Tokenizer:
        """Raises PackageError where the file is missing or damaged."""
        import tokenizers

        if info.kind == "sentencepiece":
            from llmx.runtime.spm import SpmTokenizer

            return SpmTokenizer.load(folder, info)
        path = folder / info.file
        if not path.is_file():
            raise PackageError(f"{folder} lacks {info.file}; copy or export the package again.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            reason = " ".join(str(error).split())[:160]
            raise PackageError(f"{path} is damaged ({reason}); copy or export the package again.") from None
        backend.no_truncation()  # the engine refuses what is too long, and pads nothing
        backend.no_padding()
        return Tokenizer(backend, info)

    def source(self) -> str | None:
        """The text of `tokenizer.json` as it is used; None where there is none."""
        return str(self._backend.to_str())

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, added ones included. The model may have more rows (padding)."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        """Spelling -> id of every token, added ones included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> list[int]:
        """The model's end tokens."""
        return self.info.eos_token_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises RequestError for what is not valid Unicode text."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` in which special tokens are the characters that they are written with."""
        if self._plain is None:
            self._plain = type(self._backend).from_str(self._backend.to_str())
            self._plain.encode_special_tokens = True
        with _valid_text():
            ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Iterable[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, without padding. Raises RequestError for what is not valid Unicode text."""
        texts = list(texts)
        with _valid_text():
            if len(texts) == 1:
                return [self._backend.encode(texts[0], add_special_tokens=add_special_tokens).ids]
            encodings = self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_pair(
        self, first: str, second: str | None, max_length: int | None
    ) -> tuple[list[int], list[int], list[str], list[tuple[int, int]], list[bool]]:
        """(ids, type ids, tokens, character offsets, whether special) of a text or a pair, with special tokens.

        More than `max_length` tokens are cut as transformers cuts them: the longest of a pair first. Raises RequestError
        for what is not valid Unicode text.
        """
        backend = self._backend if max_length is None else self._cutting(max_length)
        with _valid_text():
            encoding = backend.encode(first, second, add_special_tokens=True)
        special = [bool(flag) for flag in encoding.special_tokens_mask]
        return encoding.ids, encoding.type_ids, encoding.tokens, encoding.offsets, special

    def _cutting(self, max_length: int) -> Any:
        """A copy of the backend that truncates: a setting of the backend, which other calls must not see."""
        if max_length not in self._truncating:
            backend = type(self._backend).from_str(self._backend.to_str())
            backend.enable_truncation(max_length)
            self._truncating[max_length] = backend
        return self._truncating[max_length]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """transformers' `decode`, its optional clean-up of spaces before punctuation included.

        Ids beyond the vocabulary have no text. Raises RequestError for what is no token id at all.
        """
        text = self.decode_raw(ids, skip_special_tokens)
        return clean_up_spaces(text) if self.cleans_up_spaces else text

    def decode_raw(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """`decode` before the clean-up of spaces."""
        try:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        except (TypeError, OverflowError):
            raise RequestError("Token ids must be whole numbers from 0.") from None

    def token(self, token_id: int) -> str:
        """The vocabulary's spelling of a token, or "" for an id that has none (a padded embedding row)."""
        return self._backend.id_to_token(token_id) or ""

    def byte_level(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level vocabulary, as tokenizers' ByteLevel decoder reads its spelling."""
        known = self._byte_level.get(token_id)
        if known is None:
            spelling = self.token(token_id)
            values = [_BYTE_OF.get(char) for char in spelling]
            # A spelling with other characters is an added token: its text stands for itself.
            known = spelling.encode() if None in values else bytes(v for v in values if v is not None)
            self._byte_level[token_id] = known
        return known

    def byte_fallback(self, token_id: int) -> int | None:
        """The byte that a token like `<0xE2>` stands for, or None."""
        match = _BYTE_TOKEN.fullmatch(self.token(token_id))
        return int(match[1], 16) if match else None


def _decoder_steps(decoder: Any) -> list[str]:
    """Names of the decoder's steps in order, nested sequences flattened; [] where there is none."""

    def flat(state: dict[str, Any]) -> list[str]:
        inner = state.get("decoders")
        return [str(state.get("type"))] if inner is None else [name for item in inner for name in flat(item)]

    return [] if decoder is None else flat(json.loads(decoder.__getstate__()))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's `bytes_to_unicode`, reversed: printable bytes are their own character, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def clean_up_spaces(text: str) -> str:
    """transformers' `clean_up_tokenization`: one pass for each of these, in order."""
    for before, after in _CLEAN_UP:
        text = text.replace(before, after)
    return text


_CLEAN_UP = [
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
]  # fmt: skip


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

    def push(self, token_id: int) -> str:
        return self._emit(self._decoder.decode(self._bytes_of(token_id)))

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
