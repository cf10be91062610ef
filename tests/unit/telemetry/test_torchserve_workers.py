from __future__ import annotations

import logging

import pytest

from minserve.telemetry.events import Event, EventKind, EventLog
from minserve.telemetry.logging import OUTPUT
from minserve.telemetry.torchserve_workers import WORKERS, WorkerLines, name_of


def said(caplog: pytest.LogCaptureFixture, *kinds: EventKind, lines: WorkerLines | None = None) -> list[str]:
    caplog.set_level(logging.DEBUG, WORKERS.name)
    caplog.set_level(logging.DEBUG, OUTPUT)
    caplog.clear()
    lines = lines or WorkerLines()
    for kind in kinds:
        detail = "restart in 2 s" if kind is EventKind.RESTART else f"{kind} it was"
        lines.heard("echo", Event(7.25, "echo", kind, detail, worker=1))
    return caplog.messages


@pytest.mark.parametrize(
    ("who", "name"),
    [("echo/0", "W-9000-echo_1.0"), ("echo:2.0/3", "W-9003-echo_2.0"), ("a.b-c/12", "W-9012-a.b-c_1.0")],
)
def test_a_worker_has_torchserves_name(who: str, name: str) -> None:
    assert name_of(who) == name


def test_a_death_and_the_recovery_from_it(caplog: pytest.LogCaptureFixture) -> None:
    assert said(caplog, EventKind.READY, EventKind.RANK_DIED, EventKind.RESTART, EventKind.READY) == [
        "echo/1 | Torch worker started.",
        "W-9001-echo_1.0 State change null -> WORKER_STARTED",
        "W-9001-echo_1.0 State change WORKER_STARTED -> WORKER_MODEL_LOADED",
        "9001 Worker disconnected. WORKER_MODEL_LOADED",
        "Backend worker error\nrank-died it was",
        "W-9001-echo_1.0 State change WORKER_MODEL_LOADED -> WORKER_STOPPED",
        "Auto recovery start timestamp: 7250",
        "Retry worker: 9001 in 2 seconds.",
        "echo/1 | Torch worker started.",
        "W-9001-echo_1.0 State change null -> WORKER_STARTED",
        "W-9001-echo_1.0 State change WORKER_STARTED -> WORKER_MODEL_LOADED",
        "Auto recovery succeeded, reset recoveryStartTS",
    ]


def test_a_start_that_fails_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    messages = said(caplog, EventKind.START_FAILED, EventKind.START_FAILED, EventKind.GIVEN_UP, EventKind.START_FAILED)
    recoveries = [message for message in messages if message.startswith("Auto recovery")]
    assert recoveries == [
        "Auto recovery start timestamp: 7250",
        "Auto recovery failed again",
        "Auto recovery failed, given-up it was",
        "Auto recovery start timestamp: 7250",
    ]
    assert "9001 Worker disconnected. WORKER_STARTED" in messages
    assert "Load model failed: echo, error: Worker died. start-failed it was" in messages


def test_a_batch_that_takes_too_long(caplog: pytest.LogCaptureFixture) -> None:
    messages = said(caplog, EventKind.TIMEOUT)
    assert "Backend worker error\nBackend worker did not respond in given time: timeout it was" in messages


@pytest.mark.parametrize("kind", [EventKind.HANDLER_ERROR, EventKind.STREAM_CANCELLED, EventKind.REVIVED])
def test_what_ends_no_worker_is_no_line(caplog: pytest.LogCaptureFixture, kind: EventKind) -> None:
    assert said(caplog, kind) == []


def test_the_records_carry_the_workers_name(caplog: pytest.LogCaptureFixture) -> None:
    said(caplog, EventKind.READY)
    assert {record.__dict__["worker"] for record in caplog.records if record.name == WORKERS.name} == {
        "W-9001-echo_1.0"
    }


def test_an_event_log_tells_each_event() -> None:
    heard: list[Event] = []
    log = EventLog("echo", now=lambda: 1.0, on_event=heard.append)
    log.record(EventKind.READY, "ready", 0)
    log.record(EventKind.READY, "ready", 0)
    assert heard == [Event(1.0, "echo", EventKind.READY, "ready", 0)] * 2
