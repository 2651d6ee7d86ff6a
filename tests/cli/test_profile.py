"""`llmx run --profile`: the table adds up, the trace is valid and whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from llmx.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def seconds(profile: dict[str, list[dict[str, object]]], *names: str) -> float:
    found = {str(p["name"]): float(str(p["seconds"])) for p in profile["phases"]}
    return sum(found[name] for name in names)


def test_phases_operators_and_the_time_line(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    result = run("run", "--onnx", demo, "--prompt", "ROMEO:", "-n", 12, "--seed", 1, "--json", "--profile", file)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["finish_reason"] == "length"
    profile = json.loads(file.read_text())["otherData"]
    calls = {p["name"]: p["calls"] for p in profile["phases"]}
    assert calls["load"] == calls["tokenise"] == calls["prefill"] == 1
    assert calls["decode"] == 11 and calls["step"] == 12
    assert calls["sample"] >= 12 and calls["detokenise"] >= 12
    inner = ("prefill", "decode", "sample", "detokenise", "schedule and the rest")
    assert seconds(profile, *inner) == pytest.approx(seconds(profile, "step"))
    whole = seconds(profile, "load", "tokenise", "step", "the rest (imports, printing)")
    assert whole == pytest.approx(profile["seconds"])
    assert sum(o["share"] for o in profile["operators"]) == pytest.approx(2.0)  # of two graphs
    [attention] = [o for o in profile["operators"] if (o["graph"], o["operator"]) == ("decode", "GroupQueryAttention")]
    assert attention["calls"] == 11 * 5  # steps × layers
    decode = next(p for p in profile["phases"] if p["name"] == "decode")
    kernels = sum(o["seconds"] for o in profile["operators"] if o["graph"] == "decode")
    assert 0 < kernels <= decode["in_run"] <= decode["seconds"]

    events = json.loads(file.read_text())["traceEvents"]
    named = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    timed = [e for e in events if e["ph"] == "X"]
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in timed)
    assert sum(e["tid"] == named["operators of decode"] for e in timed) == sum(
        o["calls"] for o in profile["operators"] if o["graph"] == "decode"
    )
    runs = [e for e in timed if e["name"] == "run decode"]
    for kernel in (e for e in timed if e["tid"] == named["operators of decode"]):  # one clock: operators lie in runs
        assert any(r["ts"] - 500 <= kernel["ts"] <= r["ts"] + r["dur"] + 500 for r in runs)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_the_table_goes_to_standard_error(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    plain = run("run", "--onnx", demo, "--prompt", "ROMEO:", "-n", 6, "--seed", 1)
    result = run("run", "--onnx", demo, "--prompt", "ROMEO:", "-n", 6, "--seed", 1, "--profile", file)
    assert result.stdout == plain.stdout
    assert "GroupQueryAttention" in result.stderr and "detokenise" in result.stderr and str(file) in result.stderr


def test_carried_packages_and_encoder_decoders(package: Callable[[str], Path], tmp_path: Path) -> None:
    for name, graph in (("bloom", "decode"), ("t5", "encoder")):
        file = tmp_path / f"{name}.json"
        result = run("run", "--onnx", package(name), "--prompt", "a b c", "-n", 4, "--json", "--profile", file)
        assert result.exit_code == 0, result.output
        profile = json.loads(file.read_text())["otherData"]
        assert graph in {o["graph"] for o in profile["operators"]}
        inside = {p["name"]: p["in_run"] for p in profile["phases"]}
        assert inside["step"] > 0 and inside["decode"] > 0
        assert json.loads(file.read_text())["traceEvents"]


@pytest.mark.parametrize("where", ["missing/trace.json", "."])
def test_a_place_that_cannot_be_written_is_refused_before_the_run(demo: Path, tmp_path: Path, where: str) -> None:
    result = run("run", "--onnx", tmp_path / "nothing", "--prompt", "x", "--profile", tmp_path / where)
    assert result.exit_code == 2
    assert "--profile" in result.stderr and "Traceback" not in result.stderr


def test_a_failed_run_leaves_nothing(demo: Path, tmp_path: Path) -> None:
    result = run("run", "--onnx", demo, "--prompt", "x " * 2000, "--profile", tmp_path / "trace.json")
    assert result.exit_code == 2 and "shorten" in result.stderr
    assert list(tmp_path.iterdir()) == []
