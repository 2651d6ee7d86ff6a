"""`llmx bench serve`: it measures what the server did, keeps to its limits, and says what failed."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from fake_openai import FakeServer
from llmx.bench.load import Load, Outcome, arrivals, make_prompts
from llmx.bench.load import run as run_load
from llmx.bench.load_report import most_at_once, parse_goodput, report
from llmx.cli import main
from llmx.runtime.errors import LlmxError, RequestError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", "serve", *[str(a) for a in arguments]])


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
@pytest.mark.parametrize("cut", [(0, "\n"), (7, "\r\n")])
def test_latencies_are_those_of_the_server(backend: str, cut: tuple[int, str]) -> None:
    """A chat's opening role is no token; events may be cut anywhere."""
    with FakeServer(first=0.1, gap=0.02, piece=cut[0], newline=cut[1]) as server:
        load = Load(server.url, backend=backend, num_prompts=3, max_concurrency=1, output_len=5)
        outcomes, seconds = asyncio.run(run_load(load))
    assert [o.error for o in outcomes] == [None] * 3
    for o in outcomes:
        assert (o.prompt_len, o.output_tokens, len(o.gaps)) == (7, 5, 4)
        assert o.ttft >= 0.1 and o.latency >= 0.1 + 4 * 0.02 - 0.01
        assert o.latency == pytest.approx(o.ttft + sum(o.gaps))
        assert o.tpot == pytest.approx(sum(o.gaps) / 4)
    assert seconds >= sum(o.latency for o in outcomes) >= 3 * 0.17
    facts = report(load, outcomes, seconds, {})
    assert facts["output_throughput"] == pytest.approx(15 / seconds)
    assert facts["ttft_ms"]["p50"] == pytest.approx(1e3 * float(np.median([o.ttft for o in outcomes])))


def test_no_more_at_once_than_asked_and_all_at_once_without(server: FakeServer) -> None:
    server.together = 3
    asyncio.run(run_load(Load(server.url, num_prompts=12, max_concurrency=3, output_len=3)))
    assert server.most == 3
    server.most, server.together = 0, 12
    server.bodies.clear()
    outcomes, _ = asyncio.run(run_load(Load(server.url, num_prompts=12, output_len=3)))
    assert server.most == 12 == most_at_once(outcomes)
    assert len(server.bodies) == 12 + 1  # one goes first and does not count


def test_requests_are_what_was_asked(server: FakeServer) -> None:
    result = run(
        "--base-url", server.url, "--num-prompts", 4, "--random-input-len", 20, "--random-output-len", 6, "--ignore-eos",
        "--random-prefix-len", 5, "--extra-body", '{"top_k": 3}', "--api-key", "secret", "--vocab-size", 50, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for body, head in zip(server.bodies, server.headers, strict=True):
        assert body["model"] == "fake-model" and body["max_tokens"] == 6 and body["stream"] is True
        assert body["ignore_eos"] is True and body["top_k"] == 3 and body["temperature"] == 0.0
        assert len(body["prompt"]) == 25 and max(body["prompt"]) < 50
        assert body["prompt"][:5] == server.bodies[0]["prompt"][:5]
        assert "authorization: bearer secret" in head.lower()
    assert "secret" not in result.output
    facts = json.loads(result.stdout)
    assert (facts["completed"], facts["failed"], facts["total_output_tokens"]) == (4, 0, 24)


def test_lengths_and_arrivals_follow_the_seed() -> None:
    load = Load("", num_prompts=4000, request_rate=50.0, input_len=100, range_ratio=0.5, output_len=10, seed=3)
    prompts = make_prompts(load)
    lengths = [p.input_len for p in prompts]
    assert min(lengths) == 50 and max(lengths) == 150 and {p.output_len for p in prompts} == set(range(5, 16))
    assert [p.content for p in make_prompts(load)] == [p.content for p in prompts]
    gaps = np.diff(arrivals(load))
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert np.std(gaps) == pytest.approx(1 / 50, rel=0.1)  # exponential gaps: a Poisson process
    assert arrivals(Load("", num_prompts=3)) == [0.0] * 3


def test_a_rate_is_kept(server: FakeServer) -> None:
    load = Load(server.url, num_prompts=20, request_rate=40.0, output_len=2)
    outcomes, _ = asyncio.run(run_load(load))
    sent = np.array([o.start for o in outcomes]) - outcomes[0].start
    assert (sent >= np.array(arrivals(load)) - 0.02).all()  # none before its time


def test_goodput_counts_requests_within_every_bound() -> None:
    outcomes = [
        Outcome(10, ttft=0.1, latency=0.5, gaps=[0.4], output_tokens=11),
        Outcome(10, ttft=0.3, latency=0.5, gaps=[0.2], output_tokens=11),
        Outcome(10, ttft=0.1, latency=2.1, gaps=[2.0], output_tokens=11),
        Outcome(10, ttft=0.01, latency=0.02, error="500: no"),
    ]
    facts = report(Load(""), outcomes, 2.0, parse_goodput(["ttft:200", "tpot:50"]))
    assert facts["request_goodput"] == pytest.approx(0.5)
    assert (facts["completed"], facts["failed"], facts["errors"]) == (3, 1, {"500: no": 1})
    for word in ("ttft", "ttft:x", "ttft:-1", "itl:5"):
        with pytest.raises(RequestError, match="METRIC:MILLISECONDS"):
            parse_goodput([word])


def test_what_fails_is_counted_with_its_reason(server: FakeServer) -> None:
    faults = {1: (429, {"error": {"message": "too many"}}), 2: "event", 3: "cut"}
    server.fail = faults.get
    facts = json.loads(run("--base-url", server.url, "--num-prompts", 5, "--max-concurrency", 1, "--json").stdout)
    assert (facts["completed"], facts["failed"]) == (2, 3)
    reasons = " ".join(facts["errors"])
    assert "429: too many" in reasons and "the engine broke" in reasons and "RemoteProtocolError" in reasons


def test_connections_are_used_again_and_silence_ends_a_request(server: FakeServer) -> None:
    outcomes, _ = asyncio.run(run_load(Load(server.url, "m", num_prompts=9, max_concurrency=3, output_len=4)))
    assert [o.error for o in outcomes] == [None] * 9 and server.connections == 3
    server.first = 0.5
    load = Load(server.url, "m", num_prompts=1, output_len=4, timeout=0.2)
    with pytest.raises(LlmxError, match=r"TimeoutError: nothing came for 0\.2 s"):
        asyncio.run(run_load(load))
    server.first, server.gap = 0.15, 0.15  # what comes in time is waited for, however long it takes in all
    outcomes, _ = asyncio.run(run_load(load))
    assert outcomes[0].error is None and outcomes[0].latency > 0.5


def test_a_server_that_refuses_or_is_not_there_is_said_in_a_sentence(server: FakeServer) -> None:
    server.fail = lambda _: (401, {"error": {"message": "no key", "code": "invalid_api_key"}})
    refused = run("--base-url", server.url, "--model", "m")
    assert refused.exit_code == 1 and "401: no key" in refused.stderr
    absent = run("--base-url", "http://127.0.0.1:9", "--num-prompts", 1)
    assert absent.exit_code == 1 and "ConnectError" in absent.stderr and "Traceback" not in absent.stderr


def test_sweep_plot_and_result_file(server: FakeServer, tmp_path: Path) -> None:
    file, plot = tmp_path / "r.json", tmp_path / "r.png"
    rates = ("--request-rate", "20,40", "--num-prompts", 6, "--random-output-len", 3)
    result = run(
        "--base-url", server.url, *rates, "--result-file", file, "--plot", plot, "--goodput", "ttft:500 tpot:90"
    )
    assert result.exit_code == 0, result.output
    runs = json.loads(file.read_text())["runs"]
    assert [r["settings"]["request_rate"] for r in runs] == [20.0, 40.0]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "TTFT" in result.stdout and "goodput" in result.stdout
    one = run("--base-url", server.url, "--num-prompts", 4, "--plot", tmp_path / "one.png")
    assert one.exit_code == 0 and (tmp_path / "one.png").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "r.json", "r.png"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--request-rate", "0"], "no list of rates above 0"),
        (["--extra-body", "[1]"], "takes a JSON object"),
        (["--goodput", "itl:5"], "METRIC:MILLISECONDS"),
        (["--tokenizer", "nowhere"], "--tokenizer: nowhere cannot be read"),
        (["--result-file", "nowhere/x.json"], "does not exist"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], sentence: str) -> None:
    result = run("--base-url", "http://127.0.0.1:9", *arguments)
    assert result.exit_code == 2 and sentence in " ".join(result.stderr.replace("│", " ").split())


def test_without_httpx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    result = run("--num-prompts", 1)
    assert result.exit_code == 1 and 'pip install "llmx[bench]"' in result.stderr
