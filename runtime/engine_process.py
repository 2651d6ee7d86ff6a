"""The process that an engine has for itself: the other end of `remote.RemoteLLM`.

It gets messages `(kind, …)`: "load" (a function that makes the LLM), then "submit" (numbers of requests, and the token ids
and parameters of each), "cancel", "stats", "close". It says "ready" or "failed", answers each "submit" by "submitted" and
each "stats" by "told", and sends one "step" for all that a step made, so that a token costs it next to nothing. It ends when
the other side does, however that ends.
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from llmx.runtime.aio import AsyncLLM
from llmx.runtime.channel import Channel
from llmx.runtime.engine_stats import engine_stats
from llmx.runtime.errors import LlmxError
from llmx.runtime.llm import LLM
from llmx.runtime.outputs import RequestMetrics, StreamPiece, TokenLogprobs
from llmx.runtime.params import SamplingParams
from llmx.runtime.scheduler import Request

INDEX_BITS = 8  # of a continuation's key: the request's number, then the continuation's
_DIED = 70  # exit status where the engine's thread has ended


class Entry:
    """A request of the other side."""

    def __init__(self, host: Host, number: int) -> None:
        self.number, self._host = number, host
        self.request: Request | None = None
        self.ready = threading.Event()  # whether `request` is known
        self.cancelled = False
        self.told = -1  # guesses that the other side knows of; -1 until its metrics were sent once
        self.turn = 0  # the last hand-over in which a piece went as a whole
        self.tells = False  # whether the pieces of that hand-over take the metrics along

    def receive(self, piece: StreamPiece) -> None:
        """From the thread that steps."""
        self._host.pieces.append((self, piece))


class Host:
    """Runs an LLM for the other end of `channel`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._entries: dict[int, Entry] = {}
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(4, "llmx-submit")  # grammars take long to compile
        self.pieces: list[tuple[Entry, StreamPiece]] = []  # of the step in progress
        self._turn = 0
        self._aio: AsyncLLM

    def run(self) -> int:
        """Until the other side says "close"; the exit status."""
        kind, load = self._channel.receive()
        assert kind == "load"
        threading.Thread(target=self._listen, name="llmx-listen", daemon=True).start()
        try:
            self._aio = AsyncLLM(llm=load())
        except Exception as error:
            self._channel.send(("failed", portable(error)))
            return 1
        llm = self._aio.llm
        llm.engine.add_waker(self.hand_over)
        gc.collect()
        gc.freeze()
        self._channel.send(("ready", {"max_length": llm.max_length, "slots": llm.backend.slots}))
        while not self._closing.wait(1.0):
            if not self._aio.alive:
                return _DIED
        self._aio._close()
        return 0

    # -- what comes ---------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while True:
                kind, *rest = self._channel.receive()
                if kind == "close":
                    self._closing.set()
                    return
                getattr(self, f"_on_{kind}")(*rest)
        except EOFError:  # nobody is left to work for
            os._exit(1)
        except Exception:
            _give_up()

    def _on_submit(self, numbers: list[int], wanted: list[tuple[list[int], SamplingParams]]) -> None:
        entries = [Entry(self, number) for number in numbers]
        self._entries.update((entry.number, entry) for entry in entries)
        self._pool.submit(self._submit, entries, wanted)

    def _submit(self, entries: list[Entry], wanted: list[tuple[list[int], SamplingParams]]) -> None:
        error: BaseException | None = None
        metrics: list[RequestMetrics | None] = []
        try:
            for entry, (ids, params) in zip(entries, wanted, strict=True):
                if not entry.cancelled:
                    [entry.request] = self._aio.submit([(ids, params, entry.receive)])
                    entry.ready.set()
                metrics.append(None if entry.request is None else entry.request.metrics)
        except Exception as refused:
            error = portable(refused)
        for entry in entries:
            if error is not None or entry.request is None:
                self._entries.pop(entry.number, None)
            if entry.request is not None and (error is not None or entry.cancelled):
                self._aio.llm.engine.cancel(entry.request)
        self._channel.send(("submitted", [entry.number for entry in entries], error, metrics))

    def _on_cancel(self, number: int) -> None:
        entry = self._entries.get(number)
        if entry is not None:
            entry.cancelled = True
            if entry.request is not None:  # else who submits it looks
                self._aio.llm.engine.cancel(entry.request)

    def _on_stats(self, number: int) -> None:
        self._channel.send(("told", number, engine_stats(self._aio.llm)))

    # -- what goes ----------------------------------------------------------------------------------------------------

    def hand_over(self) -> None:
        """Send what the step made. From the thread that steps."""
        if self.pieces:
            try:
                self._send_step()
            except Exception:  # else requests would wait for ever
                _give_up()

    def _send_step(self) -> None:
        """A piece that is a token and its text goes as one item of three lists. The first of a request, those with more in
        them and what follows them go as they are, after the others: a continuation's order is kept.
        """
        pieces, self.pieces = self.pieces, []
        self._turn += 1
        keys, texts, tokens = [], [], []
        others: list[Any] = []
        ended: dict[int, Entry] = {}
        for entry, piece in pieces:
            request = entry.request
            if request is None:
                entry.ready.wait()
                request = entry.request
                assert request is not None
            told = request.metrics.num_drafted
            if (
                piece.finish_reason is None
                and piece.logprobs is None
                and entry.told == told
                and entry.turn != self._turn
            ):
                keys.append(entry.number << INDEX_BITS | piece.index)
                texts.append(piece.text)
                tokens.append(piece.token_ids[0])
                continue
            if entry.turn != self._turn:
                entry.turn, entry.tells = self._turn, entry.told != told
            metrics = request.metrics if entry.tells else None
            prompt = packed(request.prompt_logprobs) if entry.told < 0 else None
            entry.told = told
            others.append((
                entry.number << INDEX_BITS | piece.index, piece.text, piece.token_ids, piece.finish_reason, piece.stop_reason,
                portable_entries(piece.logprobs), metrics, prompt,
            ))  # fmt: skip
            if piece.finish_reason is not None and request.finished:
                ended[entry.number] = entry
        ends = [self._end(entry) for entry in ended.values()]
        self._channel.send(("step", time.perf_counter(), keys, texts, tokens, others, ends))

    def _end(self, entry: Entry) -> tuple[Any, ...]:
        """What is known of a request once it has ended. Of a search it is only now that its outputs are known."""
        request = entry.request
        assert request is not None
        self._entries.pop(entry.number, None)
        outputs = None
        if request.error is None and is_search(request.params):
            outputs = [
                (s.index, s.text, s.output_ids, portable_entries(s.logprobs), s.finish_reason, s.stop_reason)
                for s in request.sequences
            ]
        error = None if request.error is None else portable(request.error)
        return entry.number, error, request.metrics, outputs


def _give_up() -> NoReturn:
    """Of a fault of this program: an end that the other side sees, with its traceback."""
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(_DIED)


def load_llm(folder: Path, device: str, **options: Any) -> LLM:
    """An LLM that is warm; options as LLM's."""
    llm = LLM(folder, device, **options)
    llm.warmup()
    if llm.encoder is None:
        llm.engine.grammars.warm()
    return llm


def is_search(params: SamplingParams) -> bool:
    """Whether outputs are chosen among more, at the end."""
    return (params.num_beams or 1) > 1 or params.num_samples > params.n


def portable_entries(entries: list[TokenLogprobs | None] | list[TokenLogprobs] | None) -> Any:
    """Log-probabilities as plain tuples: pickling a dataclass takes ten times as long. `remote` reads them."""
    if entries is None:
        return None
    return [entry and {t: (p.logprob, p.rank, p.decoded_token) for t, p in entry.items()} for entry in entries]


def packed(entries: list[TokenLogprobs | None] | None) -> list[bytes] | None:
    """As portable_entries, each pickled by itself: those of a prompt may be a million numbers, which the other side's event
    loop does not look at.
    """
    if entries is None:
        return None
    return [pickle.dumps(portable_entries([entry]), pickle.HIGHEST_PROTOCOL) for entry in entries]


def portable(error: BaseException) -> BaseException:
    """`error` as another process may have it: llmx's own as they are, others as a RuntimeError that shows where it was raised."""
    if isinstance(error, LlmxError):
        return type(error)(*error.args)
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    plain.add_note("In the engine's process:\n" + "".join(traceback.format_exception(error)))
    return plain


def main() -> None:
    """The process, which ignores SIGINT and SIGTERM: its one argument is an open socket's descriptor."""
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    status = Host(channel).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of onnxruntime or of a grammar that still compiles hold nobody up
