"""Spans of OpenTelemetry: one for each sequence that ended, in vLLM's names, sent to an OTLP collector."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.errors import ConfigError
from jaxllm.request import Request
from jaxllm.scheduling.plan import Plan, RequestUpdate
from jaxllm.scheduling.recording.recorder import Recorder

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

# Headers of a request that say which trace it belongs to (W3C Trace Context).
TRACE_HEADERS = ("traceparent", "tracestate")

_PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"


class SpanRecorder(Recorder):
    """Writes a span for every sequence, from its arrival to its end.

    Spans leave on a thread of the SDK's own, in batches; a collector that is not there costs a line in the
    log, and no request waits for one.

    Args:
        provider: to whom the spans go; shut down with the recorder.
        model: name of the model, for the spans.
    """

    def __init__(self, provider: TracerProvider, model: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("jaxllm")
        self._context_of = TraceContextTextMapPropagator().extract
        self._model = model
        # Requests are timed by a clock that never jumps, spans by the calendar's.
        self._epoch = time.time() - time.monotonic()

    def applied(self, plan: Plan, updates: Sequence[RequestUpdate], now: float) -> None:
        """See `Recorder`."""
        for update in updates:
            if update.request.status.is_finished:
                self.ended(update.request, now)

    def ended(self, request: Request, now: float) -> None:
        """See `Recorder`."""
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            "llm_request",
            context=self._context_of(request.trace_headers or {}),
            kind=SpanKind.SERVER,
            attributes=span_attributes(request, self._model, now),
            start_time=self._nanoseconds(request.arrival_time),
        )
        span.end(self._nanoseconds(now))

    def _nanoseconds(self, at: float) -> int:
        return int((at + self._epoch) * 1e9)

    def close(self) -> None:
        """See `Recorder`; sends what has not left yet."""
        self._provider.shutdown()


def span_attributes(request: Request, model: str, now: float) -> dict[str, Any]:
    """What a span says of a sequence that ended; durations in seconds, only of what happened."""
    attributes: dict[str, Any] = {
        "gen_ai.request.id": request.group_id or request.request_id,
        "gen_ai.response.model": model,
        "gen_ai.usage.prompt_tokens": request.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": len(request.token_ids) - request.num_prompt_tokens,
        "gen_ai.latency.e2e": now - request.arrival_time,
    }
    if request.status.finish_reason is not None:
        attributes["gen_ai.response.finish_reasons"] = [request.status.finish_reason]
    if request.pooling_params is None:
        params = request.sampling_params
        attributes |= {
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.n": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
        }
    arrived, began = request.arrival_time, request.first_scheduled_time
    first, last = request.first_token_time, request.last_token_time
    spans = {
        "gen_ai.latency.time_in_queue": (arrived, began),
        "gen_ai.latency.time_to_first_token": (arrived, first),
        "gen_ai.latency.time_in_model_prefill": (began, first),
        "gen_ai.latency.time_in_model_decode": (first, last),
        "gen_ai.latency.time_in_model_inference": (began, last),
    }
    for name, (start, end) in spans.items():
        if start is not None and end is not None:
            attributes[name] = max(0.0, end - start)
    return attributes


def trace_headers_of(headers: Mapping[str, str]) -> dict[str, str] | None:
    """What the headers of a request say of the trace that it is a part of; None for nothing."""
    return {name: headers[name] for name in TRACE_HEADERS if name in headers} or None


def start_tracing(endpoint: str, model: str) -> SpanRecorder:
    """A recorder whose spans go to a collector.

    Args:
        endpoint: URL of the collector. The protocol is gRPC, or what the environment variable
            OTEL_EXPORTER_OTLP_TRACES_PROTOCOL says; other variables of OTLP are heeded, too.

    Raises:
        ConfigError: OpenTelemetry is not installed, or there is no such protocol.
    """
    exporter = make_exporter(endpoint)
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "jaxllm")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return SpanRecorder(provider, model)


def make_exporter(endpoint: str) -> SpanExporter:
    """What sends spans to a collector; it connects when there are some."""
    protocol = os.environ.get(_PROTOCOL_VARIABLE, "grpc")
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

            return Grpc(endpoint=endpoint, insecure=not endpoint.startswith("https"))
        if protocol == "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

            return Http(endpoint=endpoint)
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint={endpoint!r} needs OpenTelemetry ({error}); install it with"
            " pip install 'jaxllm[otlp]'.",
            param="otlp_traces_endpoint",
        ) from error
    raise ConfigError(
        f"{_PROTOCOL_VARIABLE} is {protocol!r}: spans go by 'grpc' or 'http/protobuf'.",
        param="otlp_traces_endpoint",
    )
