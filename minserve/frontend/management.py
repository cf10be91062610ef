"""The management routes: TorchServe's /models and /models/{model} (torchserve.md 2.3, 2.4) with our fields, and our own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil
from aiohttp import hdrs, web

from minserve.errors import BadRequest, ConfigError, MinServeError, WorkerFailed
from minserve.frontend.errors import json_response
from minserve.frontend.recording import record
from minserve.frontend.routing import READ, add_route
from minserve.telemetry.events import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterable

    from minserve.registry.models import Registry, ServedModel
    from minserve.telemetry.events import Event
    from minserve.worker.worker import WorkerReport

Json = dict[str, object]
DEFAULT_LIMIT = 100


class Management:
    """The routes under /models."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Listing, describing, events, reload and record. The words among them come first: none is a version."""
        add_route(router, READ, "/models", self.list_models)
        add_route(router, READ, "/models/{model}", self.describe)
        for version in ("", "/{version}"):
            add_route(router, READ, f"/models/{{model}}{version}/events", self.events)
            add_route(router, (hdrs.METH_POST,), f"/models/{{model}}{version}/reload", self.reload)
            add_route(router, (hdrs.METH_GET,), f"/models/{{model}}{version}/record", self.record)
        add_route(router, READ, "/models/{model}/{version}", self.describe)

    async def list_models(self, request: web.Request) -> web.Response:
        """A page of models, by name. `nextPageToken` is there while more follow."""
        models: list[Json] = [
            {"modelName": model.spec.name, "modelUrl": str(model.spec.model_dir)} for model in self._registry.models()
        ]
        models += [{"modelName": name, "modelUrl": ""} for name in sorted(self._registry.broken)]
        limit = _number(request, "limit", DEFAULT_LIMIT)
        if not 0 <= limit <= DEFAULT_LIMIT:
            limit = DEFAULT_LIMIT
        start = max(0, _number(request, "next_page_token", 0))
        answer: Json = {"models": models[start : start + limit]}
        if start + limit < len(models):
            answer = {"nextPageToken": str(start + limit), **answer}
        return json_response(answer)

    async def describe(self, request: web.Request) -> web.Response:
        """One model version, the default one, or all."""
        name, version = request.match_info["model"], request.match_info.get("version")
        if version == "all":
            versions = [model for model in self._registry.models() if model.spec.name == name]
            if versions:
                return json_response([describe_model(model) for model in versions])
        if name in self._registry.broken:
            return json_response([{"modelName": name, "lastError": str(self._registry.broken[name]), "workers": []}])
        return json_response([describe_model(self._registry.find(name, version))])

    async def events(self, request: web.Request) -> web.Response:
        """What has happened to the workers of a model version, newest last: `limit` events, by default all that are kept."""
        name = request.match_info["model"]
        events: list[Event] = []
        if name not in self._registry.broken:
            log = self._registry.find(name, request.match_info.get("version")).events
            limit = _number(request, "limit", 0)
            events = log.latest(limit) if limit > 0 else log.latest()
        return json_response({"schema": SCHEMA, "model": name, "events": [_describe_event(event) for event in events]})

    async def reload(self, request: web.Request) -> web.Response:
        """Puts workers of the model directory as it is now in the place of those there are. Answers when that is done."""
        name, version = request.match_info["model"], request.match_info.get("version")
        try:
            await self._registry.reload(name, version)
        except ConfigError as error:
            raise BadRequest(str(error)) from None
        except WorkerFailed as error:
            raise MinServeError(f'Model "{name}" is not reloaded, its new workers do not start: {error}') from None
        return json_response({"status": f'Model "{name}" reloaded'})

    async def record(self, request: web.Request) -> web.StreamResponse:
        """Streams the batches of a worker, see `frontend.recording`."""
        return await record(
            request, self._registry.find(request.match_info["model"], request.match_info.get("version"))
        )


def describe_model(model: ServedModel) -> Json:
    """TorchServe's description of a model version and ours."""
    spec, config, queue = model.spec, model.spec.config, model.dispatcher
    reports = model.supervisor.report()
    unhealthy = model.supervisor.unhealthy
    description: Json = {
        "modelName": spec.name,
        "modelVersion": spec.version,
        "modelUrl": str(spec.model_dir),
        "runtime": "python",
        "minWorkers": model.workers,
        "maxWorkers": config.max_workers_or(model.workers),
        "batchSize": config.batch_size,
        "maxBatchDelay": config.max_batch_delay,
        "responseTimeout": _seconds(spec.response_timeout),
        "startupTimeout": _seconds(spec.startup_timeout),
        "maxRetryTimeoutInSec": _seconds(config.max_retry_timeout_in_sec),
        "clientTimeoutInMills": config.client_timeout_in_mills,
        "parallelType": str(config.parallel_type),
        "parallelLevel": spec.world_size if config.is_parallel else config.parallel_level or 0,
        "deviceType": "gpu" if any(report.devices for report in reports) else "cpu",
        **({"deviceIds": list(config.device_ids)} if config.device_ids else {}),
        "continuousBatching": config.continuous_batching,
        "useJobTicket": config.use_job_ticket,
        "useVenv": config.use_venv,
        "stateful": config.sequence_batching,
        "sequenceMaxIdleMSec": config.sequence_max_idle_m_sec,
        "sequenceTimeoutMSec": config.sequence_timeout_m_sec,
        "maxNumSequence": config.max_num_sequence,
        "maxSequenceJobQueueSize": config.max_sequence_job_queue_size,
        "loadedAtStartup": True,
        "workers": [_describe_worker(report) for report in reports],
        "jobQueueStatus": {"remainingCapacity": queue.remaining, "pendingRequests": queue.queued},
        "ready": any(report.serving for report in reports),
    }
    if unhealthy is not None:
        description["unhealthy"] = str(unhealthy)
    if model.supervisor.not_ready is not None:
        description["notReady"] = model.supervisor.not_ready
    return description


def _describe_worker(report: WorkerReport) -> Json:
    pids = [rank.pid for rank in report.ranks if rank.pid]
    worker: Json = {
        "id": str(report.number),
        "startTime": _timestamp(report.started_at),
        "status": "READY" if report.serving else "UNLOADING",
        "memoryUsage": _memory(pids),
        "pid": report.agent_pid,
        "gpu": report.devices is not None,
        "gpuUsage": "N/A" if report.devices is None else f"devices: {report.devices}",
        "state": str(report.state),
        "restarts": report.restarts,
        "ranks": [
            {
                "rank": rank.rank,
                "pid": rank.pid,
                "endpoint": rank.endpoint,
                "progress": rank.progress,
            }
            for rank in report.ranks
        ],
    }
    if report.last_error:
        worker["lastError"] = report.last_error
        worker["lastErrorTime"] = _timestamp(report.last_error_at)
        worker["lastLines"] = list(report.last_lines)
    return worker


def _describe_event(event: Event) -> Json:
    return {
        "time": _timestamp(event.at),
        "model": event.model,
        "worker": event.worker,
        "rank": event.rank,
        "pid": event.pid,
        "kind": str(event.kind),
        "detail": event.detail,
        "count": event.count,
    }


def _memory(pids: Iterable[int]) -> int:
    """Resident bytes of the ranks together."""
    total = 0
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def _timestamp(when: float) -> str:
    milliseconds = int(when * 1000) % 1000
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(when))}.{milliseconds:03d}Z"


def _seconds(value: float) -> float:
    """Whole seconds as an integer, which is all that TorchServe has."""
    return int(value) if value.is_integer() else value


def _number(request: web.Request, name: str, default: int) -> int:
    """A number of the query; one that is none counts as absent, as with TorchServe."""
    try:
        return int(request.query.get(name, default))
    except ValueError:
        return default
