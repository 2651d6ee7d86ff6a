"""The standard streams of a command: closed ones, full disks, readers that went away, characters they cannot show."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import click


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Within the block `sys.stdout` and `sys.stderr` fail as `_Output` and `_Messages` say."""
    _open_closed()
    with contextlib.redirect_stdout(_Output(sys.stdout)), contextlib.redirect_stderr(_Messages(sys.stderr)):
        yield


def _open_closed() -> None:
    """A stream that the caller closed (`>&-`) becomes the null device, so that no file of ours takes its descriptor."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process


class _Stream:
    """A text stream; everything but `write` and `flush` is the wrapped one's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`; what the stream's encoding lacks is written as its escape."""
        with self._failing():
            if text == "":  # nothing fails to be written, whatever the device says
                return 0
            try:
                return int(self._stream.write(text))
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                return int(self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))

    def flush(self) -> None:
        """Hand on what was written."""
        with self._failing():
            self._stream.flush()

    def _failing(self) -> contextlib.AbstractContextManager[None]:
        """What a failure within the block becomes."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Send what is still buffered to the null device: the interpreter flushes once more when it exits."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Output(_Stream):
    """Standard output: a reader that went away (`| head`) ends the command well, any other failure with one sentence.

    Once it has failed it fails for good, in case that someone on the way swallows the error.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._failure: BaseException | None = None

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except BrokenPipeError:
            self._failure = SystemExit(0)
        except OSError as error:
            self._failure = click.ClickException(f"Standard output cannot be written: {error.strerror or error}.")
        if self._failure is not None:
            self._drop()
            raise self._failure


class _Messages(_Stream):
    """Standard error: what cannot be written there is dropped, and the command goes on."""

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._drop()

    def write(self, text: str) -> int:
        super().write(text)
        return len(text)
