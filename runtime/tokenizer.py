"""Text to token ids and back."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmx.runtime.errors import PackageError, RequestError
from llmx.runtime.manifest import TokenizerInfo

# Calls for one text hold the interpreter's lock for as long as they take (3 s for a megabyte of text), those for a batch let go
# of it; but after these tokenizers warns of every fork. Characters, or tokens:
_SHORT = 1024
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
        self._whole_text: dict[int, str] = {}

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
            if len(texts) == 1 and len(texts[0]) < _SHORT:
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
            if len(first) + len(second or "") < _SHORT:
                encoding = backend.encode(first, second, add_special_tokens=True)
            else:
                [encoding] = backend.encode_batch([first if second is None else (first, second)])
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
            if len(ids) < _SHORT:
                return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
            [text] = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
            return str(text)
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

    def whole_text(self, token_id: int) -> str:
        """The text of a token of a byte-level vocabulary that holds whole characters; "" for any other."""
        known = self._whole_text.get(token_id)
        if known is None:
            try:
                known = self.byte_level(token_id).decode()
            except UnicodeDecodeError:
                known = ""
            self._whole_text[token_id] = known
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
