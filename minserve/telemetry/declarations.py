"""Every metric that the server has, declared in one place.

TorchServe's own, under its names (torchserve.md 3.2); a metrics_config file puts others in their place. Behind them ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["counter", "gauge", "histogram"]
KINDS: tuple[Kind, ...] = get_args(Kind)

HOSTNAME = "Hostname"
_HOST = ("Level", HOSTNAME)
_WORKER = ("WorkerName", *_HOST)
_DEVICE = ("Level", "DeviceId", HOSTNAME)
_INFERENCE = ("model_name", "model_version", "hostname")
_MODEL = ("ModelName", "Level")


@dataclass(frozen=True, slots=True)
class Declaration:
    """One metric.

    Attributes:
        unit: as help and log lines show it.
        dimensions: names of its labels, in their order. The last of the server's own is the host's name; the host's name of
            a model's metric is added to these.
    """

    name: str
    kind: Kind
    unit: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Declarations:
    """The metrics of the server itself, and those that handlers may record."""

    server: tuple[Declaration, ...]
    model: tuple[Declaration, ...]

    def for_ranks(self) -> str:
        """The models' metrics as the text of `Load.metrics`."""
        return json.dumps(
            [
                {"name": one.name, "type": one.kind, "unit": one.unit, "dimensions": list(one.dimensions)}
                for one in self.model
            ]
        )


REQUESTS_2XX = Declaration("Requests2XX", "counter", "Count", _HOST)
REQUESTS_4XX = Declaration("Requests4XX", "counter", "Count", _HOST)
REQUESTS_5XX = Declaration("Requests5XX", "counter", "Count", _HOST)  # with whatever is neither 2XX nor 4XX
INFERENCES = Declaration("ts_inference_requests_total", "counter", "Count", _INFERENCE)
LATENCY = Declaration("ts_inference_latency_microseconds", "counter", "Microseconds", _INFERENCE)
QUEUE_LATENCY = Declaration("ts_queue_latency_microseconds", "counter", "Microseconds", _INFERENCE)
QUEUE_TIME = Declaration("QueueTime", "gauge", "Milliseconds", _HOST)
THREAD_TIME = Declaration("WorkerThreadTime", "gauge", "Milliseconds", _HOST)
LOAD_TIME = Declaration("WorkerLoadTime", "gauge", "Milliseconds", _WORKER)
CPU = Declaration("CPUUtilization", "gauge", "Percent", _HOST)
MEMORY_USED = Declaration("MemoryUsed", "gauge", "Megabytes", _HOST)
MEMORY_AVAILABLE = Declaration("MemoryAvailable", "gauge", "Megabytes", _HOST)
MEMORY = Declaration("MemoryUtilization", "gauge", "Percent", _HOST)
DISK_USED = Declaration("DiskUsage", "gauge", "Gigabytes", _HOST)
DISK = Declaration("DiskUtilization", "gauge", "Percent", _HOST)
DISK_AVAILABLE = Declaration("DiskAvailable", "gauge", "Gigabytes", _HOST)
GPU_MEMORY = Declaration("GPUMemoryUtilization", "gauge", "Percent", _DEVICE)
GPU_MEMORY_USED = Declaration("GPUMemoryUsed", "gauge", "Megabytes", _DEVICE)
GPU = Declaration("GPUUtilization", "gauge", "Percent", _DEVICE)
PREDICTION_TIME = Declaration("PredictionTime", "gauge", "ms", _MODEL)

DEFAULT = Declarations(
    server=(
        *(REQUESTS_2XX, REQUESTS_4XX, REQUESTS_5XX, INFERENCES, LATENCY, QUEUE_LATENCY),
        *(QUEUE_TIME, THREAD_TIME, LOAD_TIME),
        *(CPU, MEMORY_USED, MEMORY_AVAILABLE, MEMORY, DISK_USED, DISK, DISK_AVAILABLE),
        *(GPU_MEMORY, GPU_MEMORY_USED, GPU),
    ),
    model=(
        Declaration("HandlerTime", "gauge", "ms", _MODEL),
        PREDICTION_TIME,
    ),
)
LEGACY = frozenset({INFERENCES.name, LATENCY.name, QUEUE_LATENCY.name})  # what mode legacy has for Prometheus


@dataclass(frozen=True, slots=True)
class Own:
    """A metric of minserve's, named as Prometheus would have it."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]


_VERSION = ("model_name", "model_version")
OWN_REQUEST_SECONDS = Own(
    "minserve_request_seconds",
    "histogram",
    "Seconds that requests spent in a stage: frontend (reading it and making its answer), batch_wait (for company), queue "
    "(for a worker's free place), broadcast (to all ranks), rank0 (until rank 0 had answered)",
    (*_VERSION, "stage"),
)
OWN_QUEUE = Own("minserve_queue_requests", "gauge", "Requests that wait in the queue", _VERSION)
OWN_WORKERS = Own("minserve_workers", "gauge", "Workers by state", (*_VERSION, "state"))
OWN_RESTARTS = Own("minserve_worker_restarts_total", "counter", "Restarts of workers whose rank group failed", _VERSION)
OWN_SHARED_MEMORY = Own(
    "minserve_shared_memory_bytes",
    "gauge",
    "Bytes of shared memory in use: requests (until no rank looks at them), answers (until their clients have them)",
    (*_VERSION, "holds"),
)
OWN_IN_FLIGHT = Own("minserve_in_flight_bytes", "gauge", "Bytes of the request bodies that are in the server", ())
