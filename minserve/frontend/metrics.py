"""GET /metrics: every metric in the text form of Prometheus.

What TorchServe has is written as its client library writes it, see `telemetry.series`; what minserve adds is written by
prometheus-client, from what the models' meters and workers say at the moment of the call.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from minserve.frontend.routing import ANY_METHOD, add_route
from minserve.telemetry.declarations import (
    OWN_IN_FLIGHT,
    OWN_QUEUE,
    OWN_REQUEST_SECONDS,
    OWN_RESTARTS,
    OWN_SHARED_MEMORY,
    OWN_WORKERS,
    Own,
)
from minserve.telemetry.events import EventKind
from minserve.telemetry.metrics import Metrics
from minserve.worker.states import State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.metrics_core import Metric

    from minserve.frontend.routing import Routes
    from minserve.registry.models import Registry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS = web.AppKey("metrics", Metrics)


class MetricsRoute:
    """The route /metrics. It asks for no token, as with TorchServe."""

    def __init__(self, registry: Registry) -> None:
        self._metrics = registry.metrics
        self._own = CollectorRegistry(auto_describe=False)
        self._own.register(_Own(registry))

    def add_routes(self, routes: Routes) -> None:
        """TorchServe takes any method."""
        add_route(routes.without_key(), ANY_METHOD, "/metrics", self.show)

    async def show(self, request: web.Request) -> web.Response:
        """All metrics, or the samples whose names are in `name[]`, which may be there several times. Empty in mode log.

        Only mode prometheus has minserve's own.
        """
        if self._metrics.gather is not None:
            await self._metrics.gather()
        names = frozenset(request.query.getall("name[]", ()))
        body = self._metrics.text(names).encode("utf-8", "replace")
        if self._metrics.mode == "prometheus":
            body += generate_latest(self._own.restricted_registry(names) if names else self._own)
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})


class _Own:
    """minserve's own metrics, gathered when they are asked for: nothing is kept up to date for nobody."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def describe(self) -> Iterable[Metric]:
        """The metrics without values: how a filter knows who has a name."""
        for own in (OWN_REQUEST_SECONDS, OWN_QUEUE, OWN_WORKERS, OWN_RESTARTS, OWN_SHARED_MEMORY, OWN_IN_FLIGHT):
            yield _family(own)

    def collect(self) -> Iterable[Metric]:
        """The metrics with their values."""
        seconds = HistogramMetricFamily(
            OWN_REQUEST_SECONDS.name, OWN_REQUEST_SECONDS.help, labels=OWN_REQUEST_SECONDS.labels
        )
        gauges = (OWN_QUEUE, OWN_WORKERS, OWN_SHARED_MEMORY, OWN_IN_FLIGHT)
        queue, workers, shared, in_flight = (_gauge(own) for own in gauges)
        restarts = CounterMetricFamily(OWN_RESTARTS.name, OWN_RESTARTS.help, labels=OWN_RESTARTS.labels)
        for model in self._registry.models():
            labels = [model.spec.name, model.spec.version]
            for stage, histogram in model.dispatcher.meters.stages.items():
                seconds.add_metric([*labels, stage], histogram.buckets(), histogram.total)
            queue.add_metric(labels, model.dispatcher.queued)
            reports = model.supervisor.report()
            states = Counter(report.state for report in reports)
            for state in State:
                workers.add_metric([*labels, state.value], states[state])
            if model.dispatcher.arena is not None:
                shared.add_metric([*labels, "requests"], model.dispatcher.arena.used)
                shared.add_metric([*labels, "answers"], sum(report.answers_held for report in reports))
            restarts.add_metric(labels, model.events.counts[EventKind.RESTART])
        in_flight.add_metric([], self._registry.metrics.in_flight())
        yield from (seconds, queue, workers, restarts, shared, in_flight)


def _family(own: Own) -> Metric:
    match own.kind:
        case "counter":
            return CounterMetricFamily(own.name, own.help, labels=own.labels)
        case "gauge":
            return GaugeMetricFamily(own.name, own.help, labels=own.labels)
        case "histogram":
            return HistogramMetricFamily(own.name, own.help, labels=own.labels)


def _gauge(own: Own) -> GaugeMetricFamily:
    return GaugeMetricFamily(own.name, own.help, labels=own.labels)
