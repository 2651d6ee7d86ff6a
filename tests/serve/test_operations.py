"""Load, leaving clients, faults, draining, restarts, metrics, settings."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from click.testing import CliRunner
from harness import Running, process, running, until
from llmx.cli.serve import read_config
from llmx.runtime import LLM, RequestError, SamplingParams
from llmx.serve import ServeConfig, load_models, sse
from llmx.serve.sse import ClientGoneError, EventStream
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

Serving = Callable[..., Running]
LONG = {"prompt": "ROMEO:", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


# -- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_within_a_step(serving: Serving, stream: bool) -> None:
    server = serving(slots=1)
    engine = server.engine
    for _ in range(3):
        with socket.create_connection(server.address) as raw:
            body = json.dumps({**LONG, "stream": stream}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            until(lambda: bool(engine.scheduler.pool.held()))
            [sequence] = engine.scheduler.pool.held()
            until(lambda sequence=sequence: sequence.num_output > 3)
        until(lambda sequence=sequence: sequence.request.cancelled)
        seen = sequence.num_output
        until(lambda sequence=sequence: sequence.slot is None)
        assert sequence.num_output <= seen + 1
        server.wait_idle()


def test_a_client_that_leaves_while_it_waits_gives_its_place_back(serving: Serving) -> None:
    server = serving(slots=1, max_queue=1)
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as first:
        next(first.iter_bytes())
        with pytest.raises(httpx.ReadTimeout):
            server.post("/v1/completions", LONG, timeout=0.3)
        until(lambda: next(iter(server.models)).queue.taken <= 1)  # the first may have ended meanwhile
    server.wait_idle()


@pytest.mark.parametrize("what", ["prompt", "prompt of a process", "grammar"])
def test_a_client_that_leaves_while_its_request_is_prepared(serving: Serving, what: str) -> None:
    """The loop does not wait for the thread that works on it, and nothing of it runs afterwards."""
    server = serving(slots=1, engine_process="process" in what)
    [model] = server.models
    entered, go_on = threading.Event(), threading.Event()
    owner, name = (model.llm.engine.grammars, "compile") if what == "grammar" else (model.llm.tokenizer, "encode")
    original = getattr(owner, name)

    def slow(*arguments: Any, **options: Any) -> Any:
        entered.set()
        assert go_on.wait(30)
        return original(*arguments, **options)

    setattr(owner, name, slow)
    body = {**LONG, "prompt": ["x", "y"]}
    if what == "grammar":
        body["structured_outputs"] = {"regex": "[a-z]{500,}"}
    try:
        with pytest.raises(httpx.ReadTimeout):
            server.post("/v1/completions", body, timeout=0.3)
        assert entered.is_set()
        until(lambda: model.queue.taken == 0)
        with httpx.Client(base_url=server.url, timeout=5) as other:
            assert other.get("/health").status_code == 200
    finally:
        go_on.set()
    server.wait_idle()
    setattr(owner, name, original)
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 3, "ignore_eos": True}).status_code == 200
    server.wait_idle()
    assert counted(server, "generation_tokens_total") < 30  # not the 900 of each


def test_a_reader_that_stops_reading_holds_nobody_up(serving: Serving) -> None:
    """Its slot is free when its answer is complete, read or not; others go on meanwhile."""
    server = serving(slots=2)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(server.address)
        body = json.dumps({**LONG, "stream": True, "logprobs": 5}).encode()
        raw.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        until(lambda: bool(server.engine.scheduler.pool.held()))
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 5}).status_code == 200
        until(lambda: server.engine.scheduler.pool.held() == [], 30)
    server.wait_idle()


def test_a_reader_that_never_reads_again_is_cut_off() -> None:
    """At the time limit, though nothing can be sent to it and it does not leave."""
    cut, closed = [], []

    async def events() -> AsyncIterator[bytes]:
        while True:
            yield b"data: {}\n\n"

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def work() -> None:
        stream = EventStream(events(), lambda: closed.append(1), time.monotonic() - 0.9)
        with pytest.raises(ClientGoneError):
            await stream({"type": "http", "state": {"abort": lambda: cut.append(1)}}, never, never)

    asyncio.run(asyncio.wait_for(work(), 10))
    assert cut == closed == [1]


# -- load -------------------------------------------------------------------------------------------------------------


def test_overload_is_refused_at_once_and_the_others_are_served(serving: Serving, demo: Path) -> None:
    server = serving(slots=2, max_queue=2)
    with LLM(demo) as llm:
        greedy = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
        expected = llm.generate("ROMEO:", greedy)[0].outputs[0].text

    async def work() -> list[tuple[int, str, dict[str, str]]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def one() -> tuple[int, str, dict[str, str]]:
                answer = await client.post("/v1/completions", json={**LONG, "max_tokens": 150})
                return answer.status_code, answer.text, dict(answer.headers)

            return await asyncio.gather(*(one() for _ in range(40)))

    answers = asyncio.run(work())
    accepted = [json.loads(text) for status, text, _ in answers if status == 200]
    refused = [(text, headers) for status, text, headers in answers if status == 429]
    assert len(accepted) >= 4 and len(accepted) + len(refused) == 40 and len(refused) >= 20
    assert {answer["choices"][0]["text"] for answer in accepted} == {expected}
    for text, headers in refused:
        assert int(headers["retry-after"]) >= 1 and json.loads(text)["error"]["code"] == "rate_limit_exceeded"
    server.wait_idle()


def test_what_a_loop_that_is_behind_has_not_sent_goes_out_together(serving: Serving) -> None:
    """One event for all tokens of a continuation that wait; none of their log-probabilities is lost."""
    server = serving(slots=2)
    loop, held, go_on = server.server.servers[0].get_loop(), threading.Event(), threading.Event()
    body = {
        "prompt": "ROMEO:",
        "max_tokens": 60,
        "temperature": 0.9,
        "seed": 3,
        "n": 2,
        "logprobs": 1,
        "ignore_eos": True,
    }
    whole = server.post("/v1/completions", body).json()
    texts, tokens, events = ["", ""], [[], []], 0
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()
        loop.call_soon_threadsafe(lambda: (held.set(), go_on.wait(30)))
        assert held.wait(30)
        until(lambda: not server.engine.has_work, 30)
        go_on.set()
        for line in lines:
            if line.startswith("data: {"):
                events += 1
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                texts[choice["index"]] += choice["text"]
                tokens[choice["index"]] += choice["logprobs"]["token_logprobs"]
    assert events < 100
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert tokens == [choice["logprobs"]["token_logprobs"] for choice in whole["choices"]]


def test_a_grammars_vocabulary_is_there_before_the_first_request(serving: Serving) -> None:
    """Reading it holds the interpreter for a third of a second where there are 128k tokens."""
    assert serving().engine.grammars._vocabulary is not None


def test_large_answers_are_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What json writes in one go holds the interpreter, and so the event loop."""
    entry = {str(i): {"logprob": -1.5, "rank": i, "decoded_token": 'é\u2028"'} for i in range(50)}
    choice = {"index": 0, "logprobs": {"tokens": ["a"] * 300, "top_logprobs": [None, *[entry] * 300]}}
    answer = {"choices": [choice, {**choice, "prompt_logprobs": [None, *[entry] * 300]}], "usage": {"n": 1e-9, "x": []}}
    for value in (answer, {}, [], None, "x", {"a": {"b": {"c": {"d": {"e": {"f": [1, {"g": True}]}}}}}}):
        assert sse.to_json(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    parts: list[int] = []
    original = sse._to_json
    monkeypatch.setattr(sse, "_to_json", lambda part: (parts.append(len(original(part))), original(part))[1])
    sse.to_json(answer)
    assert max(parts) <= len(original(entry))


def test_more_continuations_than_there_are_places(serving: Serving) -> None:
    server = serving(slots=2, max_queue=2)
    answer = server.post("/v1/completions", {"prompt": ["x"] * 5, "max_tokens": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert len(server.post("/v1/completions", {"prompt": ["x"] * 4, "max_tokens": 1}).json()["choices"]) == 4
    server.wait_idle()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_tokenising_does_not_hold_the_loop(serving: Serving, path: str) -> None:
    """However long a text takes, the others are answered meanwhile."""
    server = serving()
    tokenizer, go_on = next(iter(server.models)).llm.tokenizer, threading.Event()
    original = tokenizer.encode
    entered = threading.Event()

    def slow(*arguments: Any, **options: Any) -> list[int]:
        entered.set()
        assert go_on.wait(30)
        return original(*arguments, **options)

    tokenizer.encode = slow  # type: ignore[method-assign]
    body = {"prompt": "x", "max_tokens": 1} if path == "/v1/completions" else {"prompt": "x"}
    if "chat" in path:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(server.post(path, body)))
    thread.start()
    assert entered.wait(30)
    with httpx.Client(base_url=server.url, timeout=30) as other:
        assert other.get("/health").status_code == 200
        assert other.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 2}).status_code == 200
    assert not answers
    go_on.set()
    thread.join(30)
    assert answers[0].status_code == 200


def test_a_prefix_that_was_seen_is_reported(serving: Serving) -> None:
    server = serving(prefill_chunk=16)
    body = {"prompt": "ROMEO: " + "the sea " * 40, "max_tokens": 3, "temperature": 0}
    first, second = (server.post("/v1/completions", body).json() for _ in range(2))
    assert first["choices"] == second["choices"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 16 and cached % 16 == 0
    off = serving(prefill_chunk=16, prefix_cache=0)
    for _ in range(2):
        assert off.post("/v1/completions", body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_fault_inside_a_request_ends_it_alone(serving: Serving) -> None:
    """NaN logits in one slot: that stream gets an error event, its neighbour its answer, the server goes on."""
    server = serving(slots=2)
    engine = server.engine
    good = server.post("/v1/completions", {**LONG, "max_tokens": 60}).json()["choices"][0]["text"]
    original = engine.backend.prefill

    def prefill(slot: int, tokens: np.ndarray, *rest: Any) -> np.ndarray:
        logits = original(slot, tokens, *rest)
        return logits * np.float32(np.nan) if len(tokens) == 3 else logits

    engine.backend.prefill = prefill
    bad = {"prompt": [5, 6, 7], "max_tokens": 5}
    answers: list[httpx.Response] = []
    neighbour = threading.Thread(
        target=lambda: answers.append(server.post("/v1/completions", {**LONG, "max_tokens": 60}))
    )
    neighbour.start()
    whole = server.post("/v1/completions", bad)
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "model_error")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.APIError, match="NaN"):
        list(client.completions.create(model="demo", stream=True, **bad))  # type: ignore[call-overload]
    raw = server.post("/v1/completions", {**bad, "stream": True}).text
    assert raw.startswith("event: error\ndata: {") and raw.endswith("data: [DONE]\n\n")
    neighbour.join()
    assert answers[0].json()["choices"][0]["text"] == good
    server.wait_idle()
    assert server.http.get("/health").status_code == 200


def test_an_error_that_nobody_foresaw(serving: Serving) -> None:
    server = serving()
    engine = server.engine
    original = engine.check_ids
    engine.check_ids = None
    answer = server.post("/v1/completions", {"prompt": "x"})
    engine.check_ids = original
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "NoneType" not in answer.text
    server.wait_idle()
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_an_error_that_nobody_foresaw_in_a_stream_is_logged(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is told that the log has its reason."""
    from llmx.serve import completions
    from llmx.serve.logs import LOGGER

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    monkeypatch.setattr(completions.Completion, "_chunk", lambda *_: 1 / 0)
    try:
        server = serving()
        text = server.post("/v1/completions", {"prompt": "x", "max_tokens": 3, "stream": True}).text
        assert '"code":"internal_error"' in text
        until(lambda: bool(records))
    finally:
        LOGGER.removeHandler(handler)
    [record] = [r for r in records if r.exc_info]
    assert record.exc_info is not None and record.exc_info[0] is ZeroDivisionError
    server.wait_idle()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_ends_ends_the_server(serving: Serving) -> None:
    """As with a process (test_engine_process): an error for what runs, and a supervisor starts it again."""
    server = serving(slots=1)
    [model] = server.models
    told: list[int] = []
    server.models.died = lambda: told.append(1)  # it stays, to be asked
    engine = server.engine

    def fail() -> None:
        del engine.hand_over
        raise RuntimeError

    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        engine.hand_over = fail
        rest = list(lines)
    errors = [json.loads(line[6:])["error"] for line in rest if line.startswith('data: {"error"')]
    assert [error["code"] for error in errors] == ["engine_dead"] and "data: [DONE]" in rest
    until(lambda: bool(told))
    assert model.engine is not None and model.engine.died
    for refused in (server.http.get("/health"), server.post("/v1/completions", {"prompt": "x"})):
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    assert server.http.get("/ready").status_code == 503 and server.http.get("/metrics").status_code == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank"])
def test_texts_that_take_too_long_or_that_nobody_waits_for(encoder: Callable[[str], Path], path: str) -> None:
    """They end between two batches, and the next request need not wait for the rest of them."""
    package = encoder("embed" if path == "/v1/embeddings" else "rerank")
    texts = ["the sea"] * 500
    body = {"input": texts} if path == "/v1/embeddings" else {"query": "a", "documents": texts}
    with running(ServeConfig(onnx=[f"texts={package}"], request_timeout=1.5)) as server:
        llm = next(iter(server.models)).llm
        original, runs = llm.encoder.run, []

        def slow(*arguments: Any) -> Any:
            runs.append(None)
            time.sleep(0.2)
            return original(*arguments)

        llm.encoder.run = slow  # of 16 batches
        late = server.post(path, body)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert len(runs) <= 9
        started = len(runs)
        with pytest.raises(httpx.ReadTimeout):
            server.post(path, body, timeout=0.5)
        few = {**body, ("input" if "input" in body else "documents"): texts[:1]}
        assert server.post(path, few).status_code == 200
        assert len(runs) - started <= 7
        server.wait_idle()


def test_a_request_that_takes_too_long(serving: Serving) -> None:
    server = serving(request_timeout=0.2)
    whole = server.post("/v1/completions", LONG)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    streamed = server.post("/v1/completions", {**LONG, "stream": True}).text
    assert '"code":"timeout"' in streamed and streamed.endswith("data: [DONE]\n\n")
    tokenizer = next(iter(server.models)).llm.tokenizer
    original = tokenizer.encode
    tokenizer.encode = lambda *given, **named: (time.sleep(0.4), original(*given, **named))[1]  # type: ignore[method-assign]
    text = server.post("/tokenize", {"prompt": "x"})
    assert (text.status_code, text.json()["error"]["code"]) == (504, "timeout")
    server.wait_idle()


# -- metrics and settings ---------------------------------------------------------------------------------------------


def test_small_writes_go_out_at_once(served: Running) -> None:
    """An answer's head and body are two writes, and so are two tokens: the second must not wait for the first's receipt."""
    loop, done = served.server.servers[0].get_loop(), threading.Event()
    found: list[int] = []

    def look() -> None:
        for connection in served.server.server_state.connections:
            sock = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
            found.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        done.set()

    assert served.http.get("/health").status_code == 200  # its connection is kept
    loop.call_soon_threadsafe(look)
    assert done.wait(10) and found and all(found)


@pytest.mark.parametrize("engine_process", [False, True])
def test_what_memory_does_not_hold_waits_and_says_the_same(serving: Serving, engine_process: bool) -> None:
    """Ten blocks of 32 positions for three requests of some 200 each: the younger ones are preempted."""
    server = serving(slots=3, max_length=256, kv_cache_memory=0.9, prefix_cache=0, engine_process=engine_process)
    bodies = [
        {"prompt": f"ROMEO {i}:", "max_tokens": 200, "temperature": 0.8, "seed": i, "ignore_eos": True}
        for i in range(3)
    ]

    def ask(body: dict[str, Any]) -> str:
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 200
        text: str = answer.json()["choices"][0]["text"]
        return text

    alone = [ask(body) for body in bodies]
    assert counted(server, "num_preemptions_total") == 0
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, bodies)) == alone
    assert counted(server, "num_preemptions_total") > 0
    search = {"prompt": "ROMEO:", "num_beams": 3, "ignore_eos": True}
    assert server.post("/v1/completions", {**search, "max_tokens": 80}).status_code == 200
    answer = server.post("/v1/completions", {**search, "max_tokens": 200})
    assert answer.status_code == 400 and "do not fit into the 320 positions" in answer.json()["error"]["message"]


def test_memory_for_less_than_one_request_is_refused(demo: Path) -> None:
    with pytest.raises(RequestError, match="must hold a sequence of max_length 256"):
        load_models(ServeConfig(onnx=[str(demo)], max_length=256, kv_cache_memory=0.5))
    for name in ("kv_cache_memory", "prefix_cache"):
        with pytest.raises(ValidationError, match="finite number"):
            ServeConfig(onnx=[str(demo)], **{name: float("inf")})


def counted(server: Running, name: str) -> float:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == f"vllm:{name}")


def test_metrics_have_vllms_names(serving: Serving) -> None:
    server = serving()
    for _ in range(2):
        server.post("/v1/completions", {"prompt": "ROMEO:", "max_tokens": 5, "temperature": 0})
    text = server.http.get("/metrics").text
    samples = {
        (s.name, s.labels.get("finished_reason")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.labels.get("le", "+Inf") == "+Inf"
    }
    assert samples["vllm:request_success_total", "length"] == 2
    assert samples["vllm:prompt_tokens_total", None] == 4 and samples["vllm:generation_tokens_total", None] == 10
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "inter_token_latency_seconds",
                 "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"):  # fmt: skip
        assert samples[f"vllm:{name}_count", None] == 2, name
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total",
                 "prefix_cache_queries_total", "num_preemptions_total"):  # fmt: skip
        assert (f"vllm:{name}", None) in samples, name


@pytest.mark.parametrize("engine_process", [False, True])
def test_traces(demo: Path, engine_process: bool) -> None:
    """A span for each request, in the caller's trace, with its phases inside; no text in them."""
    from llmx.serve.otel import Tracer
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(
        ServeConfig(onnx=[f"demo={demo}"], engine_process=engine_process), tracer=Tracer(exporter=exporter)
    ) as server:
        body = {"prompt": "ROMEO: private", "max_tokens": 4, "stream": True}
        server.post("/v1/completions", body, headers={"traceparent": parent})
        server.post("/v1/completions", {**body, "model": "other"})
        until(lambda: len(exporter.get_finished_spans()) == 5)
    spans = {(s.name, (s.attributes or {}).get("http.response.status_code")): s for s in exporter.get_finished_spans()}
    request = spans["POST /v1/completions", 200]
    assert request.context is not None and f"{request.context.trace_id:032x}" == parent.split("-")[1]
    assert request.attributes is not None and request.attributes["gen_ai.usage.output_tokens"] == 4
    phases = [spans[name, None] for name in ("queue", "prefill", "decode")]
    assert all(p.parent is not None and p.parent.span_id == request.context.span_id for p in phases)
    assert request.start_time <= phases[0].start_time <= phases[1].start_time <= phases[2].end_time <= request.end_time
    refused = spans["POST /v1/completions", 404]
    assert refused.attributes is not None and refused.attributes["error.type"] == "model_not_found"
    assert "private" not in str([s.to_json() for s in exporter.get_finished_spans()])


def test_guessing_changes_no_output(serving: Serving, demo: Path) -> None:
    """--prompt-lookup and --draft, for many clients at a time, `n` and a grammar among them."""
    bodies: list[dict[str, Any]] = [
        {"prompt": f"{word} the sea and the sky, the sea and the sky, the sea", "max_tokens": 30, "temperature": 0}
        for word in ("On", "In", "By", "So")
    ]
    bodies[1]["n"] = 2
    bodies[2]["structured_outputs"] = {"regex": "( and the (sea|sky),){4}"}

    def answers(server: Running) -> list[Any]:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda body: server.post("/v1/completions", body).json()["choices"], bodies))
        server.wait_idle()
        return found

    plain = answers(serving(slots=4))
    for options in ({"prompt_lookup": True}, {"draft": str(demo)}):
        server = serving(slots=4, num_speculative_tokens=3, **options)
        assert answers(server) == plain
        counts = {
            sample.name: sample.value
            for family in text_string_to_metric_families(server.http.get("/metrics").text)
            for sample in family.samples
            if sample.name.startswith("vllm:spec_decode")
        }
        assert (
            0
            < counts["vllm:spec_decode_num_accepted_tokens_total"]
            <= counts["vllm:spec_decode_num_draft_tokens_total"]
        )


def test_several_packages(demo: Path, encoder: Callable[[str], Path]) -> None:
    config = ServeConfig(onnx=[f"chat={demo}", f"vectors={encoder('embed')}", f"judge={encoder('rerank')}"], slots=2)
    with running(config) as server:
        assert [m["id"] for m in server.http.get("/v1/models").json()["data"]] == ["chat", "vectors", "judge"]
        assert server.post("/v1/completions", {"model": "chat", "prompt": "x", "max_tokens": 1}).status_code == 200
        assert server.post("/v1/embeddings", {"model": "vectors", "input": [[4, 5], [6]]}).status_code == 200
        documents = ["the sea", "another text", "x"]
        answer = server.post(
            "/v1/rerank", {"model": "judge", "query": "sea", "documents": documents, "top_n": 2}
        ).json()
        with LLM(encoder("rerank")) as llm:
            expected = llm.rerank("sea", documents, top_n=2)
        assert [(r["index"], r["relevance_score"], r["document"]["text"]) for r in answer["results"]] == [
            (r.index, pytest.approx(r.score), r.document) for r in expected
        ]
        refused = server.post("/v1/embeddings", {"model": "vectors", "input": "word " * 500})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    with pytest.raises(RequestError, match="Two packages are named 'demo'"):
        load_models(ServeConfig(onnx=[f"demo={demo}", f"demo={demo}"]))


def test_tokenize_and_detokenize(served: Running, demo: Path) -> None:
    with LLM(demo) as llm:
        ids = llm.tokenizer.encode("ROMEO: my lord")
        chat = llm.chat_ids([{"role": "user", "content": "hi"}])
    answer = served.post("/tokenize", {"prompt": "ROMEO: my lord", "return_token_strs": True}).json()
    assert (answer["tokens"], answer["count"], len(answer["token_strs"])) == (ids, len(ids), len(ids))
    assert served.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"] == chat
    assert served.post("/detokenize", {"tokens": ids}).json() == {"prompt": "ROMEO: my lord"}


def test_flags_win_over_variables_and_those_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('onnx = ["a"]\nport = 1\nslots = 3\nmax_queue = 7\napi_key = ["k"]\n')
    monkeypatch.setenv("LLMX_SLOTS", "4")
    monkeypatch.setenv("LLMX_PORT", "2")
    monkeypatch.setenv("LLMX_CORS_ORIGIN", '["https://x", "https://y"]')
    config = read_config({"port": 3}, file)
    assert (config.port, config.slots, config.max_queue, config.onnx) == (3, 4, 7, ["a"])
    assert config.cors_origin == ["https://x", "https://y"] and config.api_key[0].get_secret_value() == "k"
    assert "k'" not in repr(config.api_key)
    monkeypatch.setenv("LLMX_API_KEY", "sk-plain")
    assert [key.get_secret_value() for key in read_config({}, file).api_key] == ["sk-plain"]
    for given, content, message in (
        ({"port": 99999}, "", r"--port \(LLMX_PORT\)"),
        ({}, "potr = 1", "potr"),
        ({}, "port =", "cannot be read"),
    ):
        file.write_text(content)
        with pytest.raises(RequestError, match=message):
            read_config(given, file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to serve"),
        (["--onnx", "/nowhere"], "/nowhere"),
        (["--onnx", "x", "--slots", "0"], "--slots (LLMX_SLOTS)"),
    ],
)
def test_what_cannot_be_served_is_said(arguments: list[str], message: str) -> None:
    from llmx.cli import main

    result = CliRunner().invoke(main, ["serve", "--port", "0", *arguments])
    assert result.exit_code in (1, 2) and message in result.output and "Traceback" not in result.output


def test_an_address_that_is_taken_is_said_before_anything_is_loaded() -> None:
    from llmx.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["serve", "--onnx", "/nowhere", "--port", port])
    assert result.exit_code == 1 and f"127.0.0.1:{port} cannot be listened on: Address already in use" in result.output
    result = CliRunner().invoke(main, ["serve", "--onnx", "/nowhere", "--host", "no.such.host.invalid"])
    assert result.exit_code == 1 and "cannot be listened on" in result.output and "Traceback" not in result.output


# -- the process ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_sigterm_lets_running_requests_end(demo: Path) -> None:
    port = free_port()
    with process(demo, port) as server, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            kept = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.ConnectError):
                kept.get("/health")
            text = list(lines)
        assert text[-2:] == ["data: [DONE]", ""] and '"finish_reason":"length"' in text[-4]
        assert server.wait(20) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        errors = server.stderr.read() if server.stderr else ""
    lines_ = [json.loads(line) for line in errors.splitlines()]
    assert [line["status"] for line in lines_ if line["message"] == "request" and "completions" in line["path"]] == [
        200
    ]


def test_clients_retry_over_a_kill_and_a_restart(demo: Path) -> None:
    port = free_port()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=10, timeout=30)
    options = {
        "model": "demo",
        "prompt": "ROMEO:",
        "max_tokens": 400,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    texts: list[str] = []
    with process(demo, port) as first:
        texts.append(client.completions.create(**options).choices[0].text)  # type: ignore[call-overload]
        thread = threading.Thread(
            target=lambda: texts.append(client.completions.create(**options).choices[0].text)  # type: ignore[call-overload]
        )
        thread.start()
        time.sleep(0.1)
        first.kill()
    with process(demo, port):
        thread.join(60)
    assert len(texts) == 2 and texts[0] == texts[1]
