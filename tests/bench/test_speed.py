"""`llmx bench`: what it measures is what happened, and what cannot be measured is refused in a sentence."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from llmx.bench import coldstart, speed, traffic
from llmx.cli import main
from llmx.runtime import LLM, load_manifest
from llmx.runtime.tracing import Trace

SLOW = 0.004


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *[str(a) for a in arguments]])


@pytest.fixture(scope="module")
def watched(demo: Path) -> Iterator[LLM]:
    """The demo model, its sessions watched."""
    with Trace():
        llm = LLM(demo, slots=4, max_length=256, prefill_chunk=16)
    yield llm
    llm.close()


@pytest.fixture
def traced(watched: LLM) -> Iterator[LLM]:
    """The demo model under an active trace."""
    with Trace():
        yield watched


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("depth", [0, 21])
def test_every_request_is_measured_from_its_start_and_in_the_whole_batch(
    traced: LLM, batch: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that takes a known time for each prompt token and each step gives just these times."""
    real, calls = traced.backend.prefill, []

    def prefill(slot: int, token_ids: Any, start: int, *more: Any) -> Any:
        calls.append((start, len(token_ids)))
        time.sleep(SLOW * len(token_ids) / 16)
        return real(slot, token_ids, start, *more)

    decode = traced.backend.decode

    def slow_decode(*arguments: Any) -> Any:
        time.sleep(SLOW)
        return decode(*arguments)

    monkeypatch.setattr(traced.backend, "prefill", prefill)
    monkeypatch.setattr(traced.backend, "decode", slow_decode)
    result = speed.run_once(traced, speed.Point(40, 6, batch, depth), np.random.default_rng(0))
    assert len(result.first_token) == batch
    assert min(result.first_token) >= SLOW * 40 / 16
    if depth:
        assert all(start < depth <= start + count or start >= depth or start + count < depth for start, count in calls)
        assert sum(start + count == depth for start, count in calls) == batch  # a chunk ends at the depth
    assert result.decoded == batch * 6 == len(result.gaps)
    assert min(result.gaps) >= SLOW and result.decode >= 6 * SLOW
    assert len(result.step) == len(result.host) == 6
    assert not traced.engine.has_work
    assert traced.engine.backend is traced.backend


def test_the_share_outside_of_the_run_call_is_seen(traced: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmx.runtime.detokenizer import IncrementalDetokenizer

    point, real = speed.Point(8, 6), IncrementalDetokenizer.push

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return real(*arguments)

    before = speed.measure(traced, point, 2, 1, 0)
    monkeypatch.setattr(IncrementalDetokenizer, "push", slow)
    after = speed.measure(traced, point, 2, 1, 0)
    assert after["host_s"]["min"] >= 0.05 > before["host_s"]["median"]
    assert after["host_share"]["median"] > before["host_share"]["median"]
    assert 0 < before["host_share"]["median"] < 1


def test_percentiles_and_rates_of_known_runs(traced: LLM) -> None:
    runs = [speed.Run([0.2, 0.4], 0.5, gaps=[0.01 * i for i in range(1, 101)], decode=2.0, decoded=100)]
    facts = speed.summary(traced, speed.Point(50, 50, 2), runs)
    assert facts["ttft_s"]["median"] == pytest.approx(0.3)
    assert facts["prefill_tokens_per_s"]["median"] == pytest.approx(200)
    assert facts["tpot_s"]["median"] == pytest.approx(0.04)
    assert facts["decode_tokens_per_s"]["median"] == pytest.approx(50)
    assert facts["itl_s"] == pytest.approx({"mean": 0.505, "p50": 0.505, "p90": 0.901, "p99": 0.9901})


def stored(folder: Path, graph: str) -> dict[str, int]:
    """Bytes of each initializer in the weights file, as the onnx package reads them."""
    import onnx

    model = onnx.load(str(folder / graph), load_external_data=False)
    sizes = {}
    for tensor in model.graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if "length" in entries:
            sizes[tensor.name] = int(entries["length"])
    return sizes


def test_bytes_of_a_step(demo: Path, package: Callable[[str], Path]) -> None:
    """Everything stored is read once, but an embedding table that is not the head as well, and rotary tables."""
    manifest = load_manifest(demo)
    sizes = stored(demo, "decode.onnx")
    tables = [size for name, size in sizes.items() if "cos" in name or "sin" in name]
    assert traffic.weight_bytes(demo, manifest) == sum(sizes.values()) - sum(tables)
    untied = package("gpt_neox")
    shapes = stored(untied, "decode.onnx")
    left = sum(shapes.values()) - traffic.weight_bytes(untied, load_manifest(untied))
    table = next(size for name, size in shapes.items() if "embed_in" in name)
    rotary = sum(size for name, size in shapes.items() if "cos" in name or "sin" in name)
    assert left == table + rotary
    assert traffic.state_bytes(manifest, 10) == 10 * manifest.state_bytes_per_token()
    windowed = load_manifest(package("gemma2"))
    window = min(t.window for t in windowed.state if t.window)
    far = traffic.state_bytes(windowed, window + 10) - traffic.state_bytes(windowed, window)
    assert 0 < far < 10 * windowed.state_bytes_per_token()


def test_a_copy_has_a_speed() -> None:
    assert 1e8 < traffic.copy_bandwidth(2, 8 << 20, 3) < 1e13


def test_a_cold_start_is_a_new_process(demo: Path) -> None:
    facts = coldstart.measure({"onnx": str(demo), "prompt": [5, 6, 7], "threads": 1}, 1)
    times = [facts[key]["median"] for key in ("load_s", "ready_s", "first_token_s")]
    assert 0 < times[0] < times[1] < times[2]
    assert facts["private_bytes"]["median"] < facts["resident_peak_bytes"]["median"]


def test_the_command_sweeps_and_plots(demo: Path, tmp_path: Path) -> None:
    plot = tmp_path / "sweep.png"
    shape = ("-p", "8,24", "-n", 4, "-d", "0,16", "--batch-size", 2, "-r", 2, "--cold-starts", 0)
    result = run("--onnx", demo, *shape, "--json", "--plot", plot)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [(p["prompt"], p["batch"], p["depth"]) for p in report["points"]] == [
        (8, 2, 0), (24, 2, 0), (8, 2, 16), (24, 2, 16),
    ]  # fmt: skip
    for p in report["points"]:
        assert p["bandwidth_share"] == pytest.approx(
            p["bytes_per_step"] / p["tpot_s"]["median"] / report["copy_bytes_per_s"]
        )
        assert len(p["ttft_s"]["values"]) == 2
    assert plot.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    shown = run("--onnx", demo, "-p", 8, "-n", 2, "-r", 1, "--warmup", 0, "--cold-starts", 1)
    assert "TTFT" in shown.output and "Cold start" in shown.output and "private" in shown.output
    assert "depth" not in shown.output.split("Cold")[0]


def test_encoder_decoders_and_carried_state(package: Callable[[str], Path]) -> None:
    for name in ("t5", "bloom", "mamba"):
        shape = ("-p", 6, "-n", 3, "--batch-size", 2, "-r", 1, "--warmup", 0, "--cold-starts", 1, "--json")
        result = run("--onnx", package(name), *shape)
        assert result.exit_code == 0, result.output
        [point] = json.loads(result.stdout)["points"]
        assert point["decode_tokens_per_s"]["median"] > 0 and point["bytes_per_step"] > 0
    refused = run("--onnx", package("t5"), "-d", 4, "-p", 6)
    assert refused.exit_code == 2 and "leave out --n-depth" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-p", "1,x"], "no list of whole numbers"),
        (["-p", "0"], "each must be at least 1"),
        (["-p", "1000", "-n", "100"], "context holds 1024 positions, and depth, prompt and output take 1101"),
        (["--plot", "nowhere/x.png"], "does not exist"),
        (["--plot", "x.docx"], ".png or .svg"),
    ],
)
def test_what_cannot_be_measured_is_refused(demo: Path, arguments: list[str], sentence: str) -> None:
    result = run("--onnx", demo, *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert sentence in " ".join(result.stderr.split())


def test_a_plot_without_matplotlib_says_what_to_install(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--onnx", demo, "--plot", "x.png")
    assert result.exit_code == 1 and 'pip install "llmx[plot]"' in result.stderr


def test_nothing_to_measure_is_refused() -> None:
    assert "Give --onnx" in run().stderr
