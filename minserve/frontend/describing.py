"""Model versions, workers and events as the management routes show them: TorchServe's keys in its order, then our own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable

    from minserve.registry.models import ServedModel
    from minserve.telemetry.events import Event
    from minserve.worker.reports import WorkerReport

Json = dict[str, object]


def describe_model(model: ServedModel, loaded_at_startup: bool, customized: Json | None = None) -> Json:
    """TorchServe's description of a model version and ours.

    Args:
        loaded_at_startup: of any version of the model; TorchServe goes by the name.
        customized: what the handler says of itself, if it was asked.
    """
    spec, config, queue = model.spec, model.spec.config, model.dispatcher
    level = (config.parallel_level or 0) if config.parallel_type else 0  # without a type it has no effect
    stateful = config.sequence_batching
    reports = model.supervisor.report()
    unhealthy = model.supervisor.unhealthy
    description: Json = {
        "modelName": spec.name,
        "modelVersion": spec.version,
        "modelUrl": spec.url or str(spec.model_dir),
        "runtime": spec.runtime,
        "minWorkers": model.workers,
        "maxWorkers": config.max_workers_or(model.workers),
        "batchSize": config.batch_size,
        "maxBatchDelay": config.max_batch_delay,
        "responseTimeout": _seconds(spec.response_timeout),
        "startupTimeout": _seconds(spec.startup_timeout),
        "maxRetryTimeoutInSec": _seconds(config.max_retry_timeout_in_sec),
        "clientTimeoutInMills": config.client_timeout_in_mills,
        "parallelType": str(config.parallel_type),
        "parallelLevel": spec.world_size if config.is_parallel else level,
        "deviceType": "gpu" if any(report.devices for report in reports) else "cpu",
        **({"deviceIds": list(config.device_ids)} if config.device_ids else {}),
        "continuousBatching": config.continuous_batching,
        "useJobTicket": config.use_job_ticket,
        "useVenv": config.use_venv,
        "stateful": stateful,
        "sequenceMaxIdleMSec": config.sequence_max_idle_m_sec,
        "sequenceTimeoutMSec": config.sequence_timeout_m_sec,
        "maxNumSequence": config.max_num_sequence if stateful else 0,
        "maxSequenceJobQueueSize": config.max_sequence_job_queue_size if stateful else 0,
        "loadedAtStartup": loaded_at_startup,
        "workers": [_describe_worker(report) for report in reports],
        "jobQueueStatus": {"remainingCapacity": queue.remaining, "pendingRequests": queue.queued},
        **({"customizedMetadata": customized} if customized is not None else {}),
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


def describe_event(event: Event) -> Json:
    """One event, with its kind in words."""
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
    return int(value) if float(value).is_integer() else value  # a number of a JSON file may be an int
