"""Prometheus metrics under vLLM's names, so that its dashboards read them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llmx.runtime.engine_stats import EngineStats
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from llmx.serve.models import Generation, Models

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_LABEL = ("model_name",)


class Metrics:
    """The registry of one server."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self._engines = _Engines(models)
        self.registry.register(self._engines)
        self._success = self._counter(
            "request_success", "Requests by how they ended.", ("model_name", "finished_reason")
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._seconds = {
            name: self._histogram(name, text, _SECONDS)
            for name, text in (
                ("time_to_first_token_seconds", "From arrival to the first token."),
                ("inter_token_latency_seconds", "Between tokens of a request, its mean."),
                ("request_time_per_output_token_seconds", "Per token after the first."),
                ("e2e_request_latency_seconds", "From arrival to the end."),
                ("request_queue_time_seconds", "From arrival until the first prompt token ran."),
                ("request_prefill_time_seconds", "From the first prompt token run to the first token."),
                ("request_decode_time_seconds", "From the first token to the last."),
                ("request_inference_time_seconds", "From the first prompt token run to the last token."),
            )
        }
        self._sizes = {
            name: self._histogram(name, text, _TOKENS)
            for name, text in (
                ("request_prompt_tokens", "Prompt tokens of a request."),
                ("request_generation_tokens", "Tokens generated for a request."),
                ("request_params_n", "Continuations asked for."),
                ("request_params_max_tokens", "max_tokens asked for."),
            )
        }

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = _LABEL) -> Counter:
        return Counter(f"vllm:{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, _LABEL, buckets=buckets, registry=self.registry)

    def observe(self, generation: Generation) -> None:
        """Count an ended API request: each of its prompts is a request here."""
        name = generation.model.name
        for request in generation.requests:
            m = request.metrics
            for sequence in request.sequences:
                self._success.labels(name, sequence.finish_reason or "abort").inc()
            self._prompt.labels(name).inc(m.num_prompt_tokens)
            self._sizes["request_prompt_tokens"].labels(name).observe(m.num_prompt_tokens)
            self._sizes["request_generation_tokens"].labels(name).observe(m.num_output_tokens)
            self._sizes["request_params_n"].labels(name).observe(request.params.n)
            self._sizes["request_params_max_tokens"].labels(name).observe(request.params.max_tokens or 0)
            if m.first_token:
                self._observe_times(name, m)

    def _observe_times(self, name: str, m: Any) -> None:
        times = {
            "time_to_first_token_seconds": m.ttft,
            "e2e_request_latency_seconds": (m.finished or m.last_token) - m.arrival,
            "request_queue_time_seconds": m.queue_time,
            "request_prefill_time_seconds": m.prefill_time,
            "request_decode_time_seconds": m.last_token - m.first_token,
            "request_inference_time_seconds": m.last_token - m.scheduled,
        }
        if m.tpot:
            times["inter_token_latency_seconds"] = times["request_time_per_output_token_seconds"] = m.tpot
        for key, value in times.items():
            self._seconds[key].labels(name).observe(max(value, 0.0))

    async def text(self) -> bytes:
        await self._engines.ask()
        return generate_latest(self.registry)


class _Engines(Collector):
    """What the engines said of themselves when they were last asked."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._stats: dict[str, EngineStats] = {}

    async def ask(self) -> None:
        engines = {model.name: model.engine for model in self._models if model.engine is not None}
        found = await asyncio.gather(*(engine.stats() for engine in engines.values()))
        self._stats = dict(zip(engines, found, strict=True))

    def describe(self) -> Iterable[Any]:
        return []  # nothing is collected at registration

    def collect(self) -> Iterable[Any]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Continuations that hold a slot.", labels=_LABEL)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Continuations that wait for a slot.", labels=_LABEL)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Part of the state's positions in use.", labels=_LABEL)
        preempted = CounterMetricFamily(
            "vllm:num_preemptions", "Times that a continuation lost its slot to older ones.", labels=_LABEL
        )
        queries = CounterMetricFamily("vllm:prefix_cache_queries", "Prompt tokens looked up.", labels=_LABEL)
        kept = GaugeMetricFamily("llmx:prefix_cache_bytes", "State of prompt prefixes that is kept.", labels=_LABEL)
        output = CounterMetricFamily("vllm:generation_tokens", "Tokens generated.", labels=_LABEL)
        hits = CounterMetricFamily("vllm:prefix_cache_hits", "Prompt tokens whose state was kept.", labels=_LABEL)
        guesses = [
            CounterMetricFamily(f"vllm:spec_decode_{name}", text, labels=_LABEL)
            for name, text in (
                ("num_drafts", "Passes that judged guesses."),
                ("num_draft_tokens", "Tokens that speculation guessed."),
                ("num_accepted_tokens", "Guesses that stood."),
            )
        ]
        for name, stats in self._stats.items():
            output.add_metric([name], stats.num_output_tokens)
            running.add_metric([name], stats.num_running)
            waiting.add_metric([name], max(0, self._models.get(name).queue.taken - stats.num_running))
            usage.add_metric([name], stats.num_cached / stats.num_positions)
            preempted.add_metric([name], stats.num_preempted)
            queries.add_metric([name], stats.num_prefix_queries)
            hits.add_metric([name], stats.num_prefix_hits)
            kept.add_metric([name], stats.prefix_bytes)
            for metric, count in zip(guesses, stats.speculation or (), strict=False):
                metric.add_metric([name], count)
        return [running, waiting, usage, preempted, queries, hits, kept, output, *guesses]
