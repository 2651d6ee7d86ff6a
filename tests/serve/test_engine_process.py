"""The engine in a process of its own: the same answers, and an end for each of the two processes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from harness import Running, process, running, until
from llmx.runtime import LlmxError, ProviderError, load_manifest
from llmx.runtime import remote as runtime_remote
from llmx.runtime.channel import Channel
from llmx.runtime.engine_stats import EngineStats
from llmx.runtime.remote import RemoteLLM
from llmx.serve import ServeConfig, load_models, models, wire
from prometheus_client.parser import text_string_to_metric_families

Serving = Callable[..., Running]
GREEDY: dict[str, Any] = {"prompt": "ROMEO:", "max_tokens": 24, "temperature": 0}
LONG = {"prompt": "ROMEO:", "max_tokens": 900, "temperature": 0, "ignore_eos": True}
DRAWN: dict[str, Any] = {"temperature": 0.9, "seed": 5}
MESSAGES = [{"role": "user", "content": "What news?"}]
COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "several prompts": {"prompt": ["the sea", [5, 6, 7, 8], "my lord"]},
    "n": {**DRAWN, "n": 3, "max_tokens": 40},
    "log-probabilities": {**DRAWN, "n": 2, "logprobs": 3},
    "echo": {"logprobs": 2, "echo": True},
    "echo alone": {"logprobs": 1, "echo": True, "max_tokens": 0},
    "prompt log-probabilities": {"prompt_logprobs": 2},
    "stop": {**DRAWN, "stop": ["e", "\n"], "max_tokens": 60},
    "one token": {"max_tokens": 1},
    "beams": {"num_beams": 3, "n": 2, "logprobs": 1},
    "best of": {**DRAWN, "best_of": 3, "n": 2},
    "grammar": {"structured_outputs": {"regex": "(sea|sky){3}, my lord(ship)?"}, "max_tokens": 60},
    "nothing left": {"allowed_token_ids": [5], "logit_bias": {"5": -100}, "bad_words_ids": [[5]]},
    "a token that there is not": {"prompt": [10**6]},
    "too long": {"prompt": [5] * 5000},
    "no grammar": {"structured_outputs": {"regex": "("}},
}  # fmt: skip


@pytest.fixture(scope="module")
def remote(demo: Path) -> Iterator[Running]:
    with running(ServeConfig(onnx=[f"demo={demo}"], slots=4, engine_process=True)) as server:
        yield server


def stats(server: Running) -> EngineStats:
    [model] = server.models
    assert model.engine is not None
    return asyncio.run_coroutine_threadsafe(model.engine.stats(), server.server.servers[0].get_loop()).result(10)


def plain(answer: Any) -> Any:
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


def streamed(server: Running, path: str, body: dict[str, Any]) -> Any:
    """What a stream adds up to, however it was cut into events."""
    found: dict[Any, Any] = {"texts": {}, "ends": {}, "logprobs": {}, "error": None, "usage": None}
    with server.http.stream(
        "POST", path, json={**body, "stream": True, "stream_options": {"include_usage": True}}
    ) as answer:
        if answer.status_code != 200:
            return answer.status_code, json.loads(answer.read())
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line.removeprefix("data: "))
            found["error"] = data.get("error", found["error"])
            found["usage"] = data.get("usage") or found["usage"]
            for choice in data.get("choices", ()):
                index = choice["index"]
                text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                found["texts"][index] = found["texts"].get(index, "") + text
                if choice["finish_reason"] is not None:
                    found["ends"][index] = (choice["finish_reason"], choice["stop_reason"])
                for name, values in (choice["logprobs"] or {}).items():
                    found["logprobs"].setdefault((index, name), []).extend(values or ())
    return found


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions_are_those_of_a_thread(served: Running, remote: Running, name: str) -> None:
    body = {**GREEDY, **COMPLETIONS[name]}
    here, there = (server.post("/v1/completions", body) for server in (served, remote))
    assert there.status_code == here.status_code and plain(there.json()) == plain(here.json())
    if name not in ("best of", "beams"):
        assert streamed(remote, "/v1/completions", body) == streamed(served, "/v1/completions", body)
    remote.wait_idle()


def test_chats_are_those_of_a_thread(served: Running, remote: Running) -> None:
    for options in ({"temperature": 0}, {**DRAWN, "n": 2, "logprobs": True, "top_logprobs": 2}):
        body = {"messages": MESSAGES, "max_completion_tokens": 20, **options}
        here, there = (server.post("/v1/chat/completions", body).json() for server in (served, remote))
        assert plain(there) == plain(here) and there["usage"]["completion_tokens"] > 1
        assert streamed(remote, "/v1/chat/completions", body) == streamed(served, "/v1/chat/completions", body)


def test_many_at_once_say_what_they_say_alone(served: Running, remote: Running) -> None:
    rng = random.Random(0)
    bodies = [
        {"prompt": [rng.randrange(5, 200) for _ in range(rng.randrange(1, 40))], "max_tokens": rng.randrange(1, 40),
         "temperature": rng.choice([0, 0.9]), "seed": number}
        for number in range(16)
    ]  # fmt: skip
    alone = [served.post("/v1/completions", body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda body: remote.post("/v1/completions", body).json()["choices"], bodies))
    assert together == alone
    remote.wait_idle()


def test_usage_while_a_stream_runs_counts_each_token(remote: Running) -> None:
    body = {**GREEDY, "stream": True, "logprobs": 0, "stream_options": {"continuous_usage_stats": True}}
    counted = 0
    with remote.http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                data = json.loads(line.removeprefix("data: "))
                counted += len(data["choices"][0]["logprobs"]["tokens"])
                assert counted <= data["usage"]["completion_tokens"] <= 24
    assert counted == data["usage"]["completion_tokens"] == 24


def test_a_client_that_leaves_frees_its_slot(remote: Running) -> None:
    client = openai.OpenAI(base_url=f"{remote.url}/v1", api_key="x", max_retries=0)
    for _ in range(3):
        stream = client.completions.create(model="demo", stream=True, extra_body={"ignore_eos": True}, **{k: v for k, v in LONG.items() if k != "ignore_eos"})  # type: ignore[call-overload]  # fmt: skip
        next(iter(stream))
        assert stats(remote).num_running == 1
        stream.close()
        until(lambda: stats(remote).num_running == 0)
        made = stats(remote).num_output_tokens
        time.sleep(0.05)
        assert stats(remote).num_output_tokens == made
    with pytest.raises(httpx.ReadTimeout):
        remote.post("/v1/completions", LONG, timeout=0.2)
    remote.wait_idle()


def test_a_client_that_leaves_before_its_request_is_taken(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its grammar compiles in the other process: nothing of it stays in either, and nobody else waits."""
    import faulty_engine

    monkeypatch.setattr(models, "load_llm", faulty_engine.load)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    slow = {**LONG, "structured_outputs": {"choice": ["slow"]}}
    with running(ServeConfig(onnx=[f"demo={demo}"], slots=1, engine_process=True)) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.post("/v1/completions", slow, timeout=0.2)
        start = time.monotonic()
        assert server.post("/v1/completions", GREEDY).status_code == 200 and time.monotonic() - start < 0.7
        time.sleep(1.0)  # until it has been compiled
        server.wait_idle()
        [model] = server.models
        assert not model.llm._requests and not model.llm._sequences  # type: ignore[union-attr]


def test_metrics_and_health(demo: Path) -> None:
    with running(ServeConfig(onnx=[f"demo={demo}"], slots=2, engine_process=True, prefill_chunk=16)) as server:
        body = {"prompt": "ROMEO: " + "the sea " * 40, "max_tokens": 5, "temperature": 0}
        cached = [server.post("/v1/completions", body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]  # fmt: skip
        samples = {
            s.name: s.value
            for family in text_string_to_metric_families(server.http.get("/metrics").text)
            for s in family.samples
            if s.labels.get("le", "+Inf") == "+Inf"
        }
        assert server.http.get("/health").status_code == server.http.get("/ready").status_code == 200
    assert cached[0] == 0 < cached[1] == samples["vllm:prefix_cache_hits_total"]
    assert samples["vllm:generation_tokens_total"] == 10 and samples["llmx:prefix_cache_bytes"] > 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
                 "request_prefill_time_seconds", "request_decode_time_seconds"):  # fmt: skip
        assert samples[f"vllm:{name}_count"] == 2 and 0 < samples[f"vllm:{name}_sum"] < 60, name


def test_guessing_changes_no_output(demo: Path, served: Running) -> None:
    body = {"prompt": "On the sea and the sky, the sea and the sky, the sea", "max_tokens": 40, "temperature": 0}
    config = ServeConfig(onnx=[f"demo={demo}"], engine_process=True, prompt_lookup=True, num_speculative_tokens=3)
    with running(config) as server:
        usage = server.post("/v1/completions", body).json()
        assert usage["choices"] == served.post("/v1/completions", body).json()["choices"]
        details = usage["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] > 0
        assert f"vllm:spec_decode_num_accepted_tokens_total{{model_name=\"demo\"}} {details['accepted_prediction_tokens']}" in server.http.get("/metrics").text  # fmt: skip


def test_a_fault_inside_a_request_ends_it_alone(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import faulty_engine

    monkeypatch.setattr(models, "load_llm", faulty_engine.load)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with running(ServeConfig(onnx=[f"demo={demo}"], slots=2, engine_process=True)) as server:
        good = server.post("/v1/completions", GREEDY).json()["choices"]
        answers: list[Any] = []
        neighbour = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", GREEDY).json()))
        neighbour.start()
        bad = {"prompt": [5, 6, 7], "max_tokens": 5}
        whole = server.post("/v1/completions", bad)
        assert (whole.status_code, whole.json()["error"]["code"]) == (500, "model_error")
        assert streamed(server, "/v1/completions", bad)["error"]["code"] == "model_error"
        neighbour.join()
        assert answers[0]["choices"] == good
        server.wait_idle()


def test_a_prompt_that_is_too_long_does_not_reach_the_engine(remote: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of token ids would hold it up while it reads them."""
    [model] = remote.models
    assert isinstance(model.llm, RemoteLLM)
    sent: list[Any] = []
    original = model.llm._channel.send
    monkeypatch.setattr(model.llm._channel, "send", lambda message: (sent.append(message[0]), original(message)))
    for prompt in ([5] * model.llm.max_length, ["x", "the sea " * 3000]):
        answer = remote.post("/v1/completions", {"prompt": prompt, "max_tokens": 1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "submit" not in sent
    assert remote.post("/v1/completions", {**GREEDY, "prompt": [5] * (model.llm.max_length - 1)}).status_code == 200
    assert "submit" in sent


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_prompt_do_not_hold_the_loop(
    remote: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """They may be a million numbers: taken apart, counted and written elsewhere, and no part takes long."""
    loop_thread: list[int] = []
    remote.server.servers[0].get_loop().call_soon_threadsafe(lambda: loop_thread.append(threading.get_ident()))
    until(lambda: bool(loop_thread))
    seen: list[int] = []
    original, add = runtime_remote._entries, wire.LegacyLogprobs.add

    def entries(portable: Any) -> Any:
        if portable and (len(portable) > 1 or threading.get_ident() == loop_thread[0]):
            seen.append(len(portable))
        return original(portable)

    def legacy(self: Any, ids: list[int], found: list[Any]) -> Any:
        if threading.get_ident() == loop_thread[0]:
            seen.append(len(ids))
        return add(self, ids, found)

    monkeypatch.setattr(runtime_remote, "_entries", entries)
    monkeypatch.setattr(wire.LegacyLogprobs, "add", legacy)
    body = {"prompt": [5 + i % 90 for i in range(200)], "max_tokens": 2, "logprobs": 5, "echo": True, "stream": stream}
    answer = remote.post("/v1/completions", body)
    assert answer.status_code == 200 and answer.text.count('"text_offset"') >= (2 if stream else 1)
    assert max(seen, default=0) <= 2


def test_vectors_beside_a_model_that_writes(demo: Path, encoder: Callable[[str], Path], served: Running) -> None:
    config = ServeConfig(onnx=[f"demo={demo}", f"vectors={encoder('embed')}"], slots=2, engine_process=True)
    vectors = {"model": "vectors", "input": [[4, 5], [6]]}
    with running(config) as server:
        assert [model.engine is None for model in server.models] == [False, True]
        alone = server.post("/v1/embeddings", vectors).json()["data"]
        with ThreadPoolExecutor(2) as threads:
            written = threads.submit(streamed, server, "/v1/completions", LONG)
            found = [server.post("/v1/embeddings", vectors).json()["data"] for _ in range(10)]
            assert written.result(60) == streamed(served, "/v1/completions", LONG)
        assert found == [alone] * 10
        server.wait_idle()


# -- ends -------------------------------------------------------------------------------------------------------------


def engine_of(server: Any) -> psutil.Process:
    [child] = psutil.Process(server.pid).children()
    return child


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def gone(child: psutil.Process) -> bool:
    return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_an_engine_that_is_killed_ends_the_server(demo: Path) -> None:
    """A stream gets an error event, and whoever supervises the server its exit status."""
    port = free_port()
    with process(demo, port, "--engine-process") as server:
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine_of(server).kill()
            rest = list(lines)
        errors = [json.loads(line[6:])["error"] for line in rest if line.startswith('data: {"error"')]
        assert [error["code"] for error in errors] == ["engine_dead"] and "data: [DONE]" in rest
        _, said = server.communicate(timeout=30)
        assert server.returncode == 1 and "was ended by signal 9 (SIGKILL)" in said and "Traceback" not in said


def test_a_server_that_has_lost_its_engine_says_so(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeConfig(onnx=[f"demo={demo}"], slots=2, engine_process=True)
    with running(config) as server:
        server.models.died = lambda: None  # it stays, to be asked
        [model] = server.models
        assert model.engine is not None and model.engine.pid is not None
        os.kill(model.engine.pid, signal.SIGKILL)
        until(lambda: not model.alive)
        for answer in (server.http.get("/health"), server.post("/v1/completions", GREEDY)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        assert server.http.get("/ready").status_code == 503 and server.http.get("/metrics").status_code == 200


def test_a_message_that_cannot_be_taken_ends_both(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of this program: no request waits for what was lost."""
    with running(ServeConfig(onnx=[f"demo={demo}"], slots=2, engine_process=True)) as server:
        [model] = server.models
        assert isinstance(model.llm, RemoteLLM)
        monkeypatch.setattr(model.llm, "_on_step", lambda *_: 1 / 0)
        assert streamed(server, "/v1/completions", LONG)["error"]["code"] == "engine_dead"
        until(lambda: server.server.should_exit)
        assert model.engine is not None and model.engine.died and model.llm._process.wait(10)


def test_a_server_that_is_killed_leaves_no_engine(demo: Path) -> None:
    with process(demo, free_port(), "--engine-process") as server:
        engine = engine_of(server)
        server.kill()
        server.wait()
        until(lambda: gone(engine))


@pytest.mark.parametrize("all_of_them", [False, True])
def test_sigterm_drains(demo: Path, all_of_them: bool) -> None:
    """Also where a supervisor sends it to every process of the service."""
    port = free_port()
    with process(demo, port, "--engine-process") as server:
        engine = engine_of(server)
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            for pid in (engine.pid, server.pid) if all_of_them else (server.pid,):
                os.kill(pid, signal.SIGTERM)
            rest = list(lines)
        assert any('"finish_reason":"length"' in line for line in rest) and "data: [DONE]" in rest
        assert server.wait(30) in (0, -signal.SIGTERM) and gone(engine)


def test_what_cannot_be_loaded_is_said_as_ever(demo: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(ProviderError, match="CUDA provider"):
        load_models(ServeConfig(onnx=[str(demo)], engine_process=True, device="cuda"))
    with pytest.raises(LlmxError, match="max_length must lie between"):
        load_models(ServeConfig(onnx=[str(demo)], engine_process=True, max_length=10**7))
    assert psutil.Process().children() == before


def test_where_an_engine_runs_unless_it_is_said(demo: Path) -> None:
    cpu = load_manifest(demo)
    cuda = replace(cpu, target="cuda")
    assert not models._in_process(cpu, ServeConfig()) and models._in_process(cuda, ServeConfig())
    assert models._in_process(cpu, ServeConfig(device="cuda:1")) and models._in_process(
        cpu, ServeConfig(engine_process=True)
    )
    assert not models._in_process(cuda, ServeConfig(device="cpu"))
    assert not models._in_process(cuda, ServeConfig(engine_process=False))
    assert not models._in_process(replace(cuda, family="encoder"), ServeConfig(engine_process=True))


# -- messages ---------------------------------------------------------------------------------------------------------


def test_a_channel_keeps_order_and_never_waits() -> None:
    """Sizes around those of its buffers; the reader begins when all has been sent, and takes both ways of reading."""
    rng = np.random.default_rng(0)
    messages = [bytes(int(size)) for size in rng.choice([0, 1, 100, 4096, 1 << 18, 3 << 20], 60)]
    ours, theirs = socket.socketpair()
    sender, reader = Channel(ours), Channel(theirs)
    for number, message in enumerate(messages):
        sender.send((number, message))
    found = [reader.receive() for _ in range(20)]
    deadline = time.monotonic() + 30
    while len(found) < len(messages):
        assert time.monotonic() < deadline
        found += reader.available()
    assert found == list(enumerate(messages)) and not reader.ended
    sender.close()
    assert reader.available() == [] and reader.ended
    with pytest.raises(EOFError):
        reader.receive()
    reader.send("nobody hears it")


def test_a_channel_sends_once_what_it_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a message comes just as the thread that sends what was kept has sent the last of it."""
    ours, theirs = socket.socketpair()
    sender, reader = Channel(ours), Channel(theirs)
    lock, big = sender._lock, bytes(1 << 20)
    late: list[int] = []

    class Lock:
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            emptied = not sender._kept and threading.current_thread().name == "llmx-channel"
            lock.release()
            if emptied and not late:
                late.append(1)
                sender.send((1, big))

    sender._lock = Lock()  # type: ignore[assignment]
    sender.send((0, big))
    assert [reader.receive() for _ in range(2)] == [(0, big), (1, big)]
    sender.send((2, b""))
    assert reader.receive() == (2, b"")
    sender.close()
    assert reader.available() == [] and reader.ended and not reader._buffer
