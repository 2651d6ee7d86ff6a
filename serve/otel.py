"""OpenTelemetry traces of requests, with the `otel` extra: a server span for each, in the caller's trace.

Names follow OpenTelemetry's conventions for HTTP and generative AI; the phases (queue, prefill, decode) are child spans.
Prompts, answers and keys are never in them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from llmx.runtime.errors import MissingDependencyError

if TYPE_CHECKING:
    from llmx.serve.models import Generation


class Tracer:
    """Sends spans to `endpoint` (OTLP over HTTP), or to a span `exporter` of the caller's.

    Raises MissingDependencyError without the extra.
    """

    def __init__(self, endpoint: str | None = None, exporter: Any = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.propagate import extract
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode
        except ImportError as error:
            raise MissingDependencyError(f'Traces need {error.name}: pip install "llmx[otel]".') from None
        self._extract, self._kind, self._status, self._code = extract, SpanKind, Status, StatusCode
        self._provider = TracerProvider(resource=Resource.create({"service.name": "llmx"}))
        processor: Any = SimpleSpanProcessor(exporter) if exporter is not None else None
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("llmx.serve")

    def record(
        self,
        scope: dict[str, Any],
        status: int,
        start: float,
        end: float,
        generation: Generation | None,
        error: str | None,
    ) -> None:
        """A span for a request that took from `start` to `end` (time.perf_counter)."""
        zero = time.time() - time.perf_counter()  # of perf_counter, since the epoch

        def ns(moment: float) -> int:
            return int((zero + moment) * 1e9)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        route = getattr(scope.get("route"), "path", "")
        span = self._tracer.start_span(
            f"{scope['method']} {route}".strip(),
            context=self._extract(headers),
            kind=self._kind.SERVER,
            start_time=ns(start),
            attributes={
                "http.request.method": scope["method"],
                "http.route": route,
                "http.response.status_code": status,
                **({"error.type": error} if error else {}),
            },
        )
        if generation is not None and generation.requests:
            self._add_generation(span, generation, ns)
        if status >= 500:
            span.set_status(self._status(self._code.ERROR))
        span.end(ns(end))

    def _add_generation(self, span: Any, generation: Generation, ns: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        params, metrics = generation.requests[0].params, [r.metrics for r in generation.requests]
        first = metrics[0]
        span.set_attributes(
            {
                "gen_ai.request.model": generation.model.name,
                "gen_ai.response.model": generation.model.name,
                "gen_ai.request.max_tokens": params.max_tokens or 0,
                "gen_ai.request.temperature": params.temperature or 0.0,
                "gen_ai.usage.input_tokens": sum(m.num_prompt_tokens for m in metrics),
                "gen_ai.usage.output_tokens": sum(m.num_output_tokens for m in metrics),
                "gen_ai.usage.cache_read.input_tokens": sum(m.num_cached_tokens for m in metrics),
                "gen_ai.response.finish_reasons": [s.finish_reason or "abort" for r in generation.requests for s in r.sequences],
                "gen_ai.server.time_to_first_token": first.ttft,
            }
        )  # fmt: skip
        context = set_span_in_context(span)
        phases = (
            ("queue", first.arrival, first.scheduled),
            ("prefill", first.scheduled, first.first_token),
            ("decode", first.first_token, first.last_token),
        )
        for name, start, end in phases:
            if start and end:
                self._tracer.start_span(name, context=context, start_time=ns(start)).end(ns(end))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
