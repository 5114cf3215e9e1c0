"""What the server tells of itself: log lines in JSON, and metrics for Prometheus.

A log line says how a request went, never what it said.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client import generate_latest as exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxsteer.plan import Plan
from mlxsteer.server.engine import Engine
from mlxsteer.server.jobs import Generation

log = logging.getLogger("mlxsteer.server")
router = APIRouter(tags=["status"])
_NOTE = "mlxsteer.note"


def note(request: Request, generations: Sequence[Generation], plan: Plan) -> None:
    """Remember what a request started, for its log line."""
    request.scope[_NOTE] = (list(generations), str(plan))


class Metrics:
    """Counts of requests, and the engine's own figures at the time of asking."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mlxsteer_requests", "Requests by route and status.", ["route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "mlxsteer_request_seconds", "Time until a response was complete.", ["route"],
            registry=self.registry, buckets=(0.05, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300),
        )  # fmt: skip
        self.registry.register(_EngineFigures(engine))  # type: ignore[arg-type]


class _EngineFigures:
    """The engine's status as metrics."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        status = self.engine.status()
        gauges = {
            "running": "Answers being written.",
            "prefilling": "Prompts being read.",
            "queued": "Requests that wait.",
            "tokens_per_second": "Tokens of all answers together, over the last seconds.",
            "active_memory": "Bytes that arrays hold.",
            "peak_memory": "Most bytes that arrays held.",
            "prefix_entries": "Prompts kept in the cache.",
            "prefix_bytes": "Bytes of prompts kept in the cache.",
        }
        for name, about in gauges.items():
            yield GaugeMetricFamily(f"mlxsteer_{name}", about, value=getattr(status, name))
        counters = {
            "prompt_tokens": "Tokens of prompts.",
            "cached_tokens": "Tokens of prompts that were found in the cache.",
            "answer_tokens": "Tokens of answers.",
        }
        for name, about in counters.items():
            yield CounterMetricFamily(f"mlxsteer_{name}", about, value=getattr(status, name))
        finished = CounterMetricFamily(
            "mlxsteer_finished", "Answers by how they ended.", labels=["reason"]
        )
        for reason, count in status.finished.items():
            finished.add_metric([reason], count)
        yield finished


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Figures in Prometheus' text format."""
    found: Metrics = request.app.state.metrics
    return Response(exposition(found.registry), media_type=CONTENT_TYPE_LATEST)


class Observer:
    """ASGI middleware, outermost: counts and logs every request when its response is complete."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # until a response begins, the client has none

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self._record(scope, status, time.monotonic() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        line: dict[str, Any] = {
            "event": "request",
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(1000 * seconds),
        }
        if _NOTE in scope:
            generations, steer = scope[_NOTE]
            first = generations[0]
            line |= {
                "generation": first.id,
                "steer": steer,
                "prompt_tokens": first.prompt_tokens,
                "cached_tokens": first.cached_tokens,
                "answer_tokens": sum(generation.tokens for generation in generations),
            }
        log.info("request", extra={"fields": line})


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{moment}Z", "level": record.levelname.lower()}
        line |= getattr(record, "fields", None) or {"event": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
