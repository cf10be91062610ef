"""A worker's life in the words of TorchServe's log, for those who grep it: told from the events of each model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from minserve.telemetry.events import EventKind
from minserve.telemetry.logging import OUTPUT

if TYPE_CHECKING:
    from minserve.telemetry.events import Event

WORKERS = logging.getLogger("org.pytorch.serve.wlm.WorkerThread")
FIRST_PORT = 9000  # TorchServe names workers by ports, of which ours have none
FAULTS = frozenset(
    {
        EventKind.START_FAILED,
        EventKind.RANK_DIED,
        EventKind.AGENT_DIED,
        EventKind.RANK_RAISED,
        EventKind.RANK_STALLED,
        EventKind.TIMEOUT,
        EventKind.PROTOCOL,
        EventKind.PROBE_FAILED,
    }
)


def worker_name(model: str, version: str, number: int) -> str:
    """`W-9000-echo_1.0`, as TorchServe would call the first worker of echo."""
    return f"W-{FIRST_PORT + number}-{model}_{version}"


def name_of(who: str) -> str:
    """The same of a worker that we call "echo/0" or "echo:2.0/0"."""
    title, _, number = who.rpartition("/")
    model, _, version = title.partition(":")
    return worker_name(model, version or "1.0", int(number) if number.isdecimal() else 0)


class WorkerLines:
    """Says in TorchServe's words what happens to workers. `heard` is told each event of a model's log."""

    def __init__(self) -> None:
        self._recovering: set[str] = set()

    def heard(self, title: str, event: Event) -> None:
        """Logs what TorchServe would of this event.

        Args:
            title: the model, with its version where that is not the usual one.
        """
        if event.worker is None:
            return
        worker, port = name_of(f"{title}/{event.worker}"), FIRST_PORT + event.worker
        match event.kind:
            case EventKind.READY:
                logging.getLogger(OUTPUT).info("%s/%s | Torch worker started.", title, event.worker)
                _change(worker, "null", "WORKER_STARTED")
                _change(worker, "WORKER_STARTED", "WORKER_MODEL_LOADED")
                if worker in self._recovering:
                    self._recovering.discard(worker)
                    _say(worker, "Auto recovery succeeded, reset recoveryStartTS")
            case EventKind.RESTART:
                seconds = event.detail.removeprefix("restart in ").removesuffix(" s")
                _say(worker, f"Retry worker: {port} in {seconds} seconds.")
            case EventKind.GIVEN_UP:
                self._recovering.discard(worker)
                _say(worker, f"Auto recovery failed, {event.detail}", logging.WARNING)
            case kind if kind in FAULTS:
                self._failed(title, worker, port, event)

    def _failed(self, title: str, worker: str, port: int, event: Event) -> None:
        state = "WORKER_STARTED" if event.kind is EventKind.START_FAILED else "WORKER_MODEL_LOADED"
        _say(worker, f"{port} Worker disconnected. {state}")
        if event.kind is EventKind.START_FAILED:
            model = title.partition(":")[0]
            _say(worker, f"Load model failed: {model}, error: Worker died. {event.detail}", logging.WARNING)
        late = "Backend worker did not respond in given time: " if event.kind is EventKind.TIMEOUT else ""
        _say(worker, f"Backend worker error\n{late}{event.detail}", logging.ERROR)
        _change(worker, state, "WORKER_STOPPED")
        if worker in self._recovering:
            _say(worker, "Auto recovery failed again", logging.WARNING)
        else:
            self._recovering.add(worker)
            _say(worker, f"Auto recovery start timestamp: {int(event.at * 1000)}")


def _say(worker: str, text: str, level: int = logging.INFO) -> None:
    WORKERS.log(level, "%s", text, extra={"worker": worker})


def _change(worker: str, before: str, after: str) -> None:
    _say(worker, f"{worker} State change {before} -> {after}", logging.DEBUG)
