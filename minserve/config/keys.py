"""Every key of model-config.yaml: TorchServe's frontend keys, its `torchrun:` map, and our `minserve:` section.

The attribute docstrings become the descriptions in the JSON Schema. Types are strict: `true`, `"4"` and `4.0` are no
integers, where TorchServe silently takes its default instead.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, AliasGenerator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic import WithJsonSchema as Schema
from pydantic.alias_generators import to_camel

from minserve.errors import ConfigError


class ParallelType(StrEnum):
    """How one worker spreads over its processes and devices."""

    NONE = ""
    TP = "tp"
    PP = "pp"
    PPTP = "pptp"
    CUSTOM = "custom"


def _any_case(*names: str) -> Schema:
    """Return the schema of a word whose case does not matter: an editor completes the first form, accepts all."""
    pattern = "|".join("".join(f"[{letter}{letter.upper()}]" for letter in name) for name in names if name)
    title = "one of " + ", ".join(f'"{name}"' for name in names) + ", in any case"
    return Schema({"title": title, "anyOf": [{"enum": list(names)}, {"type": "string", "pattern": f"^({pattern})$"}]})


def _to_parallel_type(value: object) -> ParallelType:
    name = str(value).lower()
    return ParallelType.NONE if name == "none" else ParallelType(name)


def _lowered(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _no_repeats(ids: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(ids)) != len(ids):
        raise ValueError("repeated")
    return ids


LARGEST = 2**31 - 1  # of a number that counts something, or milliseconds
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Port = Annotated[int, Field(ge=1, le=65535)]
Text = Annotated[str, Field(min_length=1, title="a string, not empty")]
Seconds = Annotated[float, Field(ge=0, title="a number of seconds >= 0")]
Timeout = Annotated[float, Field(gt=0, title="a number of seconds > 0")]
# YAML has lists where a frozen model wants tuples: only the container is lax, its items stay strict.
Backoff = Annotated[tuple[Seconds, ...], Field(strict=False, min_length=1, title="a list of seconds >= 0, not empty")]
DeviceIds = Annotated[
    tuple[Annotated[int, Field(ge=0, strict=True)], ...],
    Field(
        strict=False,
        min_length=1,
        title="a list of different integers >= 0, not empty",
        json_schema_extra={"uniqueItems": True},
    ),
    AfterValidator(_no_repeats),
]
# Parts that start with a dot are refused: with `..` a path would leave the model directory.
HandlerName = Annotated[
    str,
    Field(
        pattern=r"^([^/\\:.\s][^/\\:\s]*/)*[^/\\:.\s][^/\\:\s]*\.py(:[A-Za-z_][A-Za-z0-9_]*)?$",
        title="file.py or file.py:name, a path inside the model directory",
    ),
]
RendezvousConf = Annotated[
    str, Field(pattern=r"^[^=,\s]+=[^=,\s]+(,[^=,\s]+=[^=,\s]+)*$", title="key=value pairs, separated by commas")
]


class _Keys(BaseModel):
    model_config = ConfigDict(
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,
        alias_generator=to_camel,
    )


class TorchrunConfig(_Keys):
    """The `torchrun:` map. Each key is written with dashes or with underscores."""

    model_config = ConfigDict(
        alias_generator=AliasGenerator(validation_alias=lambda name: AliasChoices(name.replace("_", "-"), name))
    )

    nnodes: Count = 1
    """Machines of a worker. Default 1; more are not supported yet."""
    nproc_per_node: Count | Literal["gpu", "auto"] | None = None
    """Ranks of a worker: a number; `gpu`: one for each visible GPU; `auto`: that, or without a GPU one for each CPU
    core. The same as parallelLevel; one of the two is enough."""
    rdzv_backend: Text = "c10d"
    """Rendezvous backend. Default c10d, with a file as its store unless rdzv-endpoint is set."""
    rdzv_endpoint: Text | None = None
    """Rendezvous endpoint, host:port. Default: a file in minserve's runtime directory, which listens nowhere. With an
    endpoint the model can have one worker only."""
    rdzv_conf: RendezvousConf | None = None
    """More rendezvous settings, `key=value[,key=value]`, appended to minserve's own."""
    rdzv_id: str | int | None = None
    """Accepted for TorchServe's sake and ignored: minserve makes a new id for each start of a worker."""
    monitor_interval: Timeout | None = None
    """Seconds between torchrun's looks at its ranks. Default: torchrun's own."""
    node_rank: Whole | None = None
    """Rank of this machine. Only 0 makes sense on one machine."""
    master_addr: Text | None = None
    """Address of rank 0 for the static rendezvous."""
    master_port: Port | None = None
    """Port of rank 0 for the static rendezvous."""
    max_restarts: Whole | None = None
    """Most restarts of a worker within one retry window (maxRetryTimeoutInSec); 0: none. Default: no limit. minserve
    restarts the worker, torchrun itself always gets 0."""
    omp_num_threads: Count = Field(default=1, validation_alias=AliasChoices("OMP_NUMBER_THREADS", "OMP_NUM_THREADS"))
    """OMP_NUM_THREADS of each rank. Default 1. OMP_NUM_THREADS is accepted as the key too."""


class MinServeConfig(_Keys):
    """The `minserve:` section: what TorchServe has no key for."""

    handler: HandlerName = "handler.py"
    """The handler's file, relative to the model directory, and after a colon the function or class in it. Default
    handler.py, where the entry point is found by TorchServe's rules."""
    accept_timeout: Timeout = 30.0
    """Seconds from the start of a worker until all its ranks have connected. Default 30."""
    in_flight: Count | None = None
    """Batches that a worker may have under way at once. Default: one where a batch takes 10 ms or more, up to 16 full ones
    where it takes less; with asyncCommunication jobQueueSize; with the pipeline helper one more than it has stages, which
    work on them side by side, where 1 makes them work on one batch after another."""
    batching: Literal["adaptive", "window"] = "adaptive"
    """How long a batch that is not full waits for more requests while the worker is free: adaptive: while that pays, at most
    maxBatchDelay; window: always maxBatchDelay, as TorchServe does. Default adaptive."""
    socket_type: Literal["unix", "tcp"] = "unix"
    """Sockets between the server and the ranks. Default unix."""
    port: Port | None = None
    """With socketType tcp: the port from which the search for free ones starts. Default: 29500."""
    queue_timeout: Timeout | None = None
    """Seconds by which the queue lengthens a request's deadline beyond responseTimeout. Default: responseTimeout."""
    first_batch_timeout: Timeout | None = None
    """responseTimeout of a worker's first batch, in seconds: it may compile. Default: 5 times responseTimeout."""
    error_grace: Seconds = 2.0
    """Seconds to wait for the other ranks after one has raised, to tell cause from consequence. Default 2."""
    reply_after: Literal["rank0", "all"] = "rank0"
    """When an answer leaves: with rank 0's, or once all ranks are through the batch. Default rank0."""
    drain_timeout: Seconds = 30.0
    """Seconds that batches under way get to finish when a worker is stopped. Default 30."""
    exit_timeout: Seconds = 5.0
    """Seconds that ranks get to exit by themselves before they are killed. Default 5."""
    stable_period: Seconds = 60.0
    """Seconds of a worker in READY after which its back-off starts anew. Default 60."""
    backoff: Backoff = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0, 55.0)
    """Seconds before each restart in a row of a failed worker; the last one repeats. Default 0, 1, 2, 3, 5 ... 55."""
    stall_timeout: Seconds = 10.0
    """Seconds that a rank may be stopped, or without a heartbeat, before its worker fails. The heartbeat stands still while
    C code holds the GIL. Not while loading, not in a worker's first batch. Default 10; 0: never."""
    stream_ahead: Count | None = None
    """Steps of a stream that the ranks may be ahead of what the server has received. Default: 8, and up to 64 while steps
    come faster than the server takes them one by one."""
    stream_buffer: Count = 1024 * 1024
    """Bytes of a stream that wait for one client, where each chunk counts for 100 more than it has; with more the ranks
    pause, all at the same step. Default 1048576."""
    stream_stall_timeout: Timeout = 30.0
    """Seconds for which a client of a stream may take no byte before it counts as gone. Default 30."""
    retry_in_flight: Whole = 0
    """How often a request that was in flight when its worker failed is sent to a worker again, alone in its batch. Only for
    handlers that may see a request twice. Default 0."""
    probe_interval: Seconds = 0.0
    """Seconds without a batch after which an idle worker runs the handler's `probe()`. Default 0: only at the start."""
    scale_up_wait: Timeout = 1.0
    """Seconds that the oldest request waits before another worker is started, up to maxWorkers. Default 1."""
    scale_down_idle: Timeout = 60.0
    """Seconds for which a worker above minWorkers has nothing to do before it is drained. Default 60."""
    bodies: Literal["bytes", "view"] = "bytes"
    """What the handler gets for a body that is neither JSON nor text: a bytearray of its own, or a read-only memoryview,
    which costs no copy where the body is large. Default bytes."""
    shared_memory: Whole = 256 * 1024 * 1024
    """Most bytes of shared memory for large request bodies, one area for all workers, and as many for each worker's large
    answers. What does not fit goes over the sockets; 0: all does. Memory is used as it is needed. Default 268435456."""
    spin_micros: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Microseconds for which an idle rank looks for its next batch without giving its core away, before it sleeps. It saves
    the wake-up of a rank that has a core to itself; elsewhere it takes the core from those who have work. Default 0."""
    scheduling: Literal["normal", "batch"] = "normal"
    """How the ranks' threads get a core when they wake up. normal: they may take it from who runs there. batch: they wait
    for a free one, or for their turn (Linux's SCHED_BATCH): collectives on CPUs are faster where nothing else keeps the
    cores busy, and several times slower where something does. Default normal."""
    predict_on: Literal["all", "rank0"] = "all"
    """Which ranks run the handler for a batch: all, in step, or rank 0 alone, which calls the others itself (TorchServe's
    way with parallelType pp). Default all."""

    launcher: Literal["warm", "torchrun"] | None = None
    """What starts the ranks. warm: forks of a process that has imported torch already, with torchrun's own agent; torchrun:
    a torchrun, or without ranks a Python, of its own. Default: the server's."""

    @property
    def handler_file(self) -> str:
        """The handler's file, without the name in it."""
        return self.handler.partition(":")[0]


class ModelConfig(_Keys):
    """A validated model-config.yaml."""

    min_workers: Count | None = None
    """Workers to start. Default: 1 when maxWorkers is set, else the server's default. Honoured without maxWorkers,
    unlike TorchServe's. 0 is an error."""
    max_workers: Count | None = None
    """Most workers. Default: minWorkers."""
    batch_size: Count = 1
    """Most requests in a batch. Default 1."""
    max_batch_delay: Whole = 100
    """Most milliseconds that a request waits for a batch to fill, see `batching`. Default 100. 0 means 0, unlike
    TorchServe's."""
    response_timeout: Timeout | None = None
    """Seconds that the ranks have for a batch, or for the next chunk of a stream. Default: the server's, 120."""
    startup_timeout: Timeout | None = None
    """Seconds that a worker has from its start to READY. Default: the server's, 120."""
    device_type: Annotated[Literal["cpu", "gpu"], BeforeValidator(_lowered), _any_case("cpu", "gpu")] | None = None
    """cpu or gpu, in any case. Default: gpu where there is one. `gpu` on a machine without one means cpu."""
    device_ids: DeviceIds | None = None
    """The devices that the model's workers may use, as indices into the devices that the server sees. Default: all."""
    parallel_type: Annotated[
        ParallelType, BeforeValidator(_to_parallel_type), _any_case("", "none", "tp", "pp", "pptp", "custom")
    ] = ParallelType.NONE
    """tp, pp, pptp: ranks under torchrun, each gets every request. custom: one process that spreads over parallelLevel
    devices itself. Empty or none: one plain process, the default. In any case."""
    parallel_level: Count | None = None
    """Ranks of a worker (tp, pp, pptp) or devices of its process (custom). Default: torchrun's nproc-per-node; for
    custom without either 1."""
    torchrun: TorchrunConfig = Field(default_factory=TorchrunConfig)
    """How torchrun starts the ranks."""
    max_retry_timeout_in_sec: Seconds = 300.0
    """Seconds for which a failing worker is restarted before the model counts as unhealthy. Default 300."""
    client_timeout_in_mills: Whole = 0
    """A request's deadline in milliseconds from its arrival. Default 0: queueTimeout plus responseTimeout."""
    job_queue_size: Count | None = None
    """Most requests in the model's queue; one more gets a 503. Default: the server's, 100."""
    use_job_ticket: bool = False
    """Accept a request only while a worker is idle. Default false. Understood, not yet acted on."""
    continuous_batching: bool = False
    """Batches whose requests come and go between steps. Default false; true is an error, not yet built."""
    sequence_batching: bool = False
    """Requests of one sequence go to one worker, in order. Default false; true is an error, not yet built."""
    sequence_max_idle_m_sec: Whole = Field(default=0, validation_alias="sequenceMaxIdleMSec")
    """Milliseconds without a request after which a sequence ends. Default 0. With sequenceBatching."""
    sequence_timeout_m_sec: Whole = Field(default=0, validation_alias="sequenceTimeoutMSec")
    """Milliseconds after which a sequence ends in any case. Default 0: never. With sequenceBatching."""
    max_sequence_job_queue_size: Count = 1
    """Most queued requests of a sequence. Default 1. With sequenceBatching."""
    max_num_sequence: Count = 1
    """Most sequences at once. Default 1. With sequenceBatching."""
    async_communication: bool = False
    """Up to jobQueueSize requests are under way in a worker at once, each a task of the handler's event loop, and are
    answered in any order; `handle` should be async. Default false; an error with tp, pp or pptp."""
    use_venv: bool = False
    """A virtual environment of the model's own, which sees the server's packages; with install_py_dep_per_model it gets
    those of the archive's requirements file. Default false."""
    minserve: MinServeConfig = Field(default_factory=MinServeConfig)
    """minserve's own options."""

    @property
    def is_parallel(self) -> bool:
        """Whether a worker is a group of ranks under torchrun (tp, pp, pptp)."""
        return self.parallel_type not in (ParallelType.NONE, ParallelType.CUSTOM)

    def min_workers_or(self, default: int) -> int:
        """Return the number of workers to start; `default` when the file sets neither minWorkers nor maxWorkers."""
        if self.min_workers is not None:
            return self.min_workers
        return default if self.max_workers is None else 1

    def max_workers_or(self, default: int) -> int:
        """Return the most workers; without maxWorkers that is the number to start."""
        return self.min_workers_or(default) if self.max_workers is None else self.max_workers

    def world_size(self, visible_devices: int) -> int:
        """Return the number of ranks of a worker on a machine that shows `visible_devices` devices.

        Raises:
            ConfigError: nproc-per-node is `gpu` and there is none.
        """
        return self.devices_per_worker(visible_devices) if self.is_parallel else 1

    def devices_per_worker(self, visible_devices: int) -> int:
        """Return the number of devices that a worker spreads over, where there are devices: 1 for a plain process.

        Raises:
            ConfigError: nproc-per-node is `gpu` and there is none.
        """
        if self.parallel_type is ParallelType.NONE:
            return 1
        level = self.parallel_level or self.torchrun.nproc_per_node or 1
        if isinstance(level, int):
            return level
        devices = 0 if self.device_type == "cpu" else visible_devices
        if devices > 0:
            return devices if self.device_ids is None else len(self.device_ids)
        if level == "auto":
            return len(os.sched_getaffinity(0))  # what torchrun counts
        raise ConfigError('torchrun.nproc-per-node: found "gpu", allowed without a GPU: an integer >= 1 or "auto"')
