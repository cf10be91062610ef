import itertools

import pytest

from minserve.worker.states import TRANSITIONS, Otherwise, State, Trigger, after

# What each trigger does, written down a second time: "=" is ignored, and what is not written is refused.
LEADS = {
    State.STOPPED: "start→STARTING fail= drain= ended=",
    State.STARTING: "launched→CONNECTING fail→FAILED drain= ended→STOPPED",
    State.CONNECTING: "connected→LOADING fail→FAILED drain= ended→STOPPED",
    State.LOADING: "loaded→READY fail→FAILED drain= ended→STOPPED",
    State.READY: "fail→FAILED drain→DRAINING ended→STOPPED",
    State.BUSY: "fail→FAILED drain→DRAINING ended→STOPPED",
    State.DRAINING: "fail= drain= ended→STOPPED",
    State.FAILED: "start→STARTING fail= drain= ended→STOPPED",
}


@pytest.mark.parametrize(("state", "trigger"), list(itertools.product(State, Trigger)))
def test_every_trigger_is_decided_in_every_state(state: State, trigger: Trigger) -> None:
    decided = TRANSITIONS[state][trigger]
    leads = LEADS[state].split()
    if f"{trigger}=" in leads:
        assert decided is Otherwise.IGNORED
        assert after(state, trigger) is state
    elif isinstance(decided, State):
        assert f"{trigger}→{decided}" in leads
        assert after(state, trigger) is decided
    else:
        assert decided is Otherwise.REFUSED
        assert not any(lead.startswith(trigger) for lead in leads)
        with pytest.raises(AssertionError, match=f"{trigger} makes no sense in {state}"):
            after(state, trigger)


def test_the_table_has_no_other_rows_and_no_other_columns() -> None:
    assert TRANSITIONS.keys() == set(State)
    assert all(row.keys() == set(Trigger) for row in TRANSITIONS.values())


def test_from_every_state_a_worker_can_be_stopped_and_nothing_enters_busy() -> None:
    for row in TRANSITIONS.values():
        assert row[Trigger.ENDED] in (State.STOPPED, Otherwise.IGNORED)
        assert State.BUSY not in row.values()
