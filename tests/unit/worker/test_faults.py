import pytest

from minserve.telemetry.events import EventKind
from minserve.worker.blame import AGENT, Cause, What
from minserve.worker.faults import kind_of_fault
from minserve.worker.states import State


@pytest.mark.parametrize(
    ("what", "rank", "state", "kind"),
    [
        (What.DEATH, 1, State.BUSY, EventKind.RANK_DIED),
        (What.DEATH, 1, State.LOADING, EventKind.RANK_DIED),
        (What.DEATH, AGENT, State.BUSY, EventKind.AGENT_DIED),
        (What.EXCEPTION, 1, State.BUSY, EventKind.RANK_RAISED),
        (What.EXCEPTION, 1, State.LOADING, EventKind.START_FAILED),
        (What.SILENCE, 1, State.DRAINING, EventKind.TIMEOUT),
        (What.SILENCE, 1, State.CONNECTING, EventKind.START_FAILED),
    ],
)
def test_the_kind_of_a_fault(what: What, rank: int, state: State, kind: EventKind) -> None:
    assert kind_of_fault(Cause(what, rank, 0, "", 0.0), state) is kind


@pytest.mark.parametrize("what", list(What))
def test_every_fault_of_a_rank_has_a_kind(what: What) -> None:
    assert kind_of_fault(Cause(what, 1, 0, "", 0.0), State.BUSY) in EventKind


def test_without_a_cause_it_is_the_start_that_failed() -> None:
    assert kind_of_fault(None, State.STARTING) is EventKind.START_FAILED
