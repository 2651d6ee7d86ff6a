"""The view of the server: reading metrics, percentiles, charts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from driven import Page
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from selenium.webdriver.common.action_chains import ActionChains

BOUNDS = (0.01, 0.05, 0.1, 0.5, 1.0)


class Metrics:
    """What a server of two models says of itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        label = {"labelnames": ["model_name"], "registry": self.registry}
        self.running = Gauge("vllm:num_requests_running", "r", **label)
        self.waiting = Gauge("vllm:num_requests_waiting", "w", **label)
        self.usage = Gauge("vllm:kv_cache_usage_perc", "u", **label)
        self.tokens = Counter("vllm:generation_tokens", "g", **label)
        self.first = Histogram("vllm:time_to_first_token_seconds", "t", buckets=BOUNDS, **label)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


MODULE = 'const m = await import("/static/js/metrics.js");'


def test_the_text_format(page: Page) -> None:
    text = (
        "# HELP a b\n# TYPE a counter\na 1\nb{x=\"1\",y=\"a\\\"b\\\\c\\nd, e} f\"} 2.5e3 1700000000\nc{le=\"+Inf\"} +Inf\nd NaN\n\n"
    )  # fmt: skip
    samples = page.run(MODULE + "return m.parse(arguments[0]).map((s) => ({ ...s, value: String(s.value) }))", text)
    assert samples == [
        {"name": "a", "labels": {}, "value": "1"},
        {"name": "b", "labels": {"x": "1", "y": 'a"b\\c\nd, e} f'}, "value": "2500"},
        {"name": "c", "labels": {"le": "+Inf"}, "value": "Infinity"},
        {"name": "d", "labels": {}, "value": "NaN"},
    ]


def reference_quantile(q: float, buckets: list[tuple[float, float]]) -> float | None:
    """Prometheus' histogram_quantile (promql/quantile.go)."""
    total = buckets[-1][1]
    if not total:
        return None
    rank = q * total
    index = next(i for i, (_, count) in enumerate(buckets) if count >= rank)
    if index == len(buckets) - 1:
        return buckets[-2][0]
    start, below = buckets[index - 1] if index else (0.0, 0.0)
    end, count = buckets[index]
    return start + (end - start) * (rank - below) / (count - below)


def test_percentiles_are_those_of_prometheus(page: Page) -> None:
    random = np.random.default_rng(0)
    cases = [np.cumsum(random.integers(0, 5, 6)).tolist() for _ in range(60)] + [[0] * 6, [0, 0, 0, 0, 0, 3], [4] * 6]
    bounds = [*BOUNDS, math.inf]
    wanted = [
        [reference_quantile(q, list(zip(bounds, case, strict=True))) for q in (0.01, 0.5, 0.9, 0.99, 1.0)]
        for case in cases
    ]
    got = page.run(
        MODULE
        + """const bounds = [...arguments[1], Infinity];
        return arguments[0].map((counts) => [0.01, 0.5, 0.9, 0.99, 1].map((q) => m.quantile(q, counts.map((c, i) => [bounds[i], c]))));""",
        cases,
        list(BOUNDS),
    )
    for ours, theirs in zip(got, wanted, strict=True):
        assert [pytest.approx(x, abs=1e-12) if x is not None else None for x in theirs] == ours


def test_rates_and_restarts(page: Page) -> None:
    result = page.run(
        MODULE
        + """const r = (n, t, le) => new m.Reading(`a{model_name="x"} ${n}\\na{model_name="y"} 1\\nh_bucket{le="1"} ${le}\\nh_bucket{le="+Inf"} ${le + 1}`, t);
        const one = new m.Reading('a{model_name="x"} 5\\na{model_name="y"} 7', 0, "y");
        return [m.rate(r(10, 1000, 0), r(40, 3000, 0), "a"), m.rate(r(100, 0, 0), r(3, 2000, 0), "a"), m.rate(r(1, 5, 0), r(2, 5, 0), "a"),
            m.counted(r(0, 0, 2), r(0, 1, 6), "h").map((p) => p[1]), m.counted(r(0, 0, 9), r(0, 1, 6), "h").map((p) => p[1]),
            one.value("a"), [...one.models]];"""
    )
    assert result == [15, 2, 0, [4, 4], [6, 7], 7, ["x", "y"]]


def figures(page: Page) -> dict[str, str]:
    texts = page.texts("#figures dt, #figures dd")
    return dict(zip(texts[::2], texts[1::2], strict=True))


def legend(page: Page, chart: int) -> str:
    return page.texts("#charts .legend")[chart]


def test_the_server_is_drawn_live(page: Page) -> None:
    metrics = Metrics()
    for name, share in (("a", 2), ("b", 1)):
        metrics.running.labels(name).set(share)
        metrics.waiting.labels(name).set(0)
        metrics.usage.labels(name).set(0.25 * share)
        metrics.tokens.labels(name).inc(1000)
        metrics.first.labels(name).observe(0.3)
    page.script.metrics = metrics.text()
    page["#tab-server"].click()
    page.wait(lambda: page.all("#figures dd"))
    assert figures(page) | {
        "Running": "3",
        "Waiting": "0",
        "Tokens generated": "2,000",
        "Tokens per second": "0",
        "Cache in use": "50 %",
    } == figures(page)
    assert page.texts("#latency tbody th")[0] == "First token"

    metrics.running.labels("a").set(7)
    metrics.waiting.labels("b").set(4)
    for _ in range(100):
        metrics.first.labels("a").observe(0.03)
    metrics.tokens.labels("a").inc(600)
    page.script.metrics = metrics.text()
    page.wait(lambda: figures(page)["Running"] == "8")
    assert figures(page)["Waiting"] == "4" and float(figures(page)["Tokens per second"].replace(",", "")) > 50
    assert "running 8" in legend(page, 0) and "waiting 4" in legend(page, 0)
    assert "p50 30 ms" in legend(page, 3) and "p99 50 ms" in legend(page, 3)  # 100 of 0.01 … 0.05 in the window
    cells = page.texts("#latency tbody tr:first-child > *")
    assert cells == ["First token", "30 ms", "46 ms", "48 ms", "50 ms", "100"]
    path, label = page.run(
        "const svg = document.querySelector('#charts svg'); return [svg.querySelector('.series').getAttribute('d'), svg.getAttribute('aria-label')]"
    )
    assert path.count("L") >= 1 and label == "Requests: running 8, waiting 4"

    page["#metrics-model"].send_keys("b")  # another model: of what was read before, too
    page.wait(lambda: figures(page)["Running"] == "1")
    assert figures(page)["Tokens generated"] == "1,000"
    ActionChains(page.browser).move_to_element(page.all("#charts svg")[0]).perform()
    assert page.all("#charts .cursor")


def test_pausing_and_leaving_stop_the_reading(page: Page) -> None:
    def asked() -> int:
        return len(page.script.keys_seen)

    def silent() -> bool:
        """No request for longer than the page waits between two; one that was on its way may still arrive before."""
        before = asked()
        page.run("await new Promise((r) => setTimeout(r, 1600))")
        return asked() == before

    page["#tab-server"].click()
    before = asked()
    page.wait(lambda: asked() > before + 1)
    page["#metrics-pause"].click()
    page.wait(silent)
    before = asked()
    page["#metrics-pause"].click()
    page.wait(lambda: asked() > before)
    page["#tab-chat"].click()
    page.wait(silent)


def test_scales_are_round(page: Page) -> None:
    tops: list[Any] = page.run(
        'const c = await import("/static/js/charts.js"); return arguments[0].map(c.niceCeiling)',
        [0, 0.3, 1, 1.01, 7, 10, 99, 12345],
    )
    assert tops == pytest.approx([1, 0.4, 1, 2, 8, 10, 100, 20000])
