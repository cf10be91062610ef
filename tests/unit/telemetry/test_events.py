from __future__ import annotations

import pytest

from minserve.telemetry.events import FROM_CLIENTS, EventKind, EventLog


class Now:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        self.time += 1
        return self.time


@pytest.fixture
def log() -> EventLog:
    return EventLog("m", size=3, now=Now())


def test_the_latest_are_kept_oldest_first(log: EventLog) -> None:
    for number in range(5):
        log.record(EventKind.RESTART, f"restart {number}", worker=0)
    assert [event.detail for event in log.latest()] == ["restart 2", "restart 3", "restart 4"]
    assert [event.at for event in log.latest(1)] == [105.0]
    assert log.latest(0) == []


def test_one_like_the_latest_counts_and_keeps_the_latest_time(log: EventLog) -> None:
    for _ in range(3):
        log.record(EventKind.RANK_DIED, "was killed by SIGKILL", worker=0, rank=1, pid=7)
    (event,) = log.latest()
    assert (event.model, event.count, event.at, event.rank, event.pid) == ("m", 3, 103.0, 1, 7)


@pytest.mark.parametrize("other", [{"worker": 1}, {"rank": 1}, {"pid": 8}, {"detail": "other"}])
def test_one_that_differs_is_an_event_of_its_own(log: EventLog, other: dict[str, object]) -> None:
    first: dict[str, object] = {"detail": "was killed", "worker": 0, "rank": 0, "pid": 7}
    log.record(EventKind.RANK_DIED, **first)  # type: ignore[arg-type]
    log.record(EventKind.RANK_DIED, **{**first, **other})  # type: ignore[arg-type]
    assert [event.count for event in log.latest()] == [1, 1]


def test_errors_of_a_handler_are_alike_whatever_they_say(log: EventLog) -> None:
    log.record(EventKind.RANK_DIED, "was killed by SIGKILL", worker=0, rank=1)
    for number in range(10):
        log.record(EventKind.HANDLER_ERROR, f"ValueError: bad input {number}", worker=0, rank=0)
    died, error = log.latest()
    assert died.kind is EventKind.RANK_DIED
    assert (error.count, error.detail) == (10, "ValueError: bad input 9")


def test_what_clients_cause_pushes_no_fault_out() -> None:
    clock = iter(range(10_000))
    log = EventLog("m", now=lambda: float(next(clock)))
    log.record(EventKind.RANK_DIED, "m/0: rank 1 died", 0, 1, 77)
    for number in range(1000):
        log.record(EventKind.STREAM_CANCELLED, f"batch {number}", number % 2)
        log.record(EventKind.HANDLER_ERROR, f"bad request {number}", number % 2)
    log.record(EventKind.READY, "ready", 0)
    events = log.latest()
    assert (events[0].kind, events[-1].kind) == (EventKind.RANK_DIED, EventKind.READY)
    assert len(events) == 2 + FROM_CLIENTS
    assert [event.at for event in events] == sorted(event.at for event in events)


def test_every_event_counts_also_those_that_are_no_longer_kept(log: EventLog) -> None:
    for number in range(5):
        log.record(EventKind.RESTART, f"restart {number}", worker=0)
    assert log.counts == {EventKind.RESTART: 5}
