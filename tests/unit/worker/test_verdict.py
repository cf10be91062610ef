import asyncio
import signal

import pytest

from minserve.worker.blame import AGENT, DEATH_GATHER_S, Cause, What
from minserve.worker.verdict import Verdict
from tests.fakes import in_fake_time

SILENCE = Cause(What.SILENCE, 0, 100, "did not finish batch 3 within 10 s", 1.0)
RAISED = Cause(What.EXCEPTION, 1, 101, "raised ValueError: x", 1.0)


def died(rank: int, code: int | None = None, at: float = 1.0) -> Cause:
    return Cause(What.DEATH, rank, 100 + rank, f"ended with {code}", at, code)


class Court:
    """A verdict, and what it comes to."""

    def __init__(self, finding: Cause | Exception = SILENCE, takes: float = 0.5) -> None:
        self.finding = finding
        self.takes = takes
        self.exceptions: list[Cause] = []
        self.looked_at: list[tuple[Cause, int]] = []
        self.judged: list[Cause] = []
        self.verdict = Verdict(lambda: self.exceptions, self._look, self.judged.append)

    async def _look(self, cause: Cause, seq: int) -> Cause:
        self.looked_at.append((cause, seq))
        await asyncio.sleep(self.takes)
        if isinstance(self.finding, Exception):
            raise self.finding
        return self.finding


@in_fake_time
async def test_a_final_cause_is_judged_at_once_and_only_once() -> None:
    court = Court()
    pending = [court.verdict.pending]
    court.verdict.suspect(died(1, 7), final=True)
    pending.append(court.verdict.pending)
    assert pending == [False, True]
    court.verdict.suspect(died(0, 7), final=True)
    court.verdict.suspect_hang(SILENCE, 3)
    await asyncio.sleep(10)
    assert court.judged == [died(1, 7)]


@in_fake_time
async def test_others_are_gathered_for_a_moment_and_explain_each_other() -> None:
    court = Court()
    court.verdict.suspect(died(0, -signal.SIGTERM, 1.0), final=False)
    court.verdict.suspect(died(1, -signal.SIGKILL, 2.0), final=False)
    await asyncio.sleep(DEATH_GATHER_S - 0.01)
    assert court.judged == []
    await asyncio.sleep(0.02)
    assert [cause.rank for cause in court.judged] == [1]


@in_fake_time
async def test_an_exit_says_more_than_the_end_of_the_socket_before_it() -> None:
    court = Court()
    court.verdict.suspect(died(1), final=False)
    court.verdict.suspect(died(1, 7), final=True)
    assert court.judged == [died(1, 7)]


@in_fake_time
async def test_an_exit_that_is_late_is_waited_for_and_cuts_the_waiting_short() -> None:
    court = Court()
    court.verdict.suspect(died(1), final=False, gather=10.0)
    await asyncio.sleep(9.0)
    assert court.judged == []
    court.verdict.suspect(died(1, -signal.SIGKILL), final=False)
    await asyncio.sleep(DEATH_GATHER_S + 0.01)
    assert court.judged == [died(1, -signal.SIGKILL)]


@in_fake_time
async def test_the_end_of_the_socket_behind_an_exit_changes_nothing() -> None:
    court = Court()
    court.verdict.suspect(died(1, -signal.SIGKILL), final=False)
    court.verdict.suspect(died(1, at=1.1), final=False)
    await asyncio.sleep(1)
    assert court.judged == [died(1, -signal.SIGKILL)]


@in_fake_time
async def test_a_death_counts_from_its_first_sign() -> None:
    """Else a sibling that torchrun has terminated for it, and whose socket is seen a moment later, would be the first."""
    court = Court()
    court.verdict.suspect(died(0, at=1.0), final=False)
    court.verdict.suspect(died(1, at=1.1), final=False)
    court.verdict.suspect(died(1, -signal.SIGTERM, at=1.12), final=False)
    court.verdict.suspect(died(0, -signal.SIGTERM, at=1.13), final=False)
    await asyncio.sleep(1)
    assert [(cause.rank, cause.exit_code) for cause in court.judged] == [(0, -signal.SIGTERM)]


@in_fake_time
async def test_what_the_broadcast_knows_counts_too() -> None:
    court = Court()
    court.exceptions = [RAISED]
    court.verdict.suspect(Cause(What.COLLECTIVE, 0, 100, "raised RuntimeError: closed", 0.5), final=True)
    assert court.judged == [RAISED]


@in_fake_time
async def test_a_hang_is_looked_at_more_closely_before_anybody_is_blamed() -> None:
    found = Cause(What.STALL, 2, 102, "is stopped", 1.0)
    court = Court(found)
    court.verdict.suspect_hang(SILENCE, 3)
    court.verdict.suspect_hang(SILENCE, 3)
    assert court.verdict.pending
    assert court.judged == []
    await asyncio.sleep(1)
    assert court.looked_at == [(SILENCE, 3)]
    assert court.judged == [found]


@in_fake_time
async def test_a_death_meanwhile_explains_it_better() -> None:
    court = Court()
    court.verdict.suspect_hang(SILENCE, 3)
    await asyncio.sleep(0.1)
    court.verdict.suspect(died(AGENT, -9), final=True)
    await asyncio.sleep(1)
    assert court.judged == [died(AGENT, -9)]


@in_fake_time
async def test_a_look_that_fails_leaves_what_was_noticed(caplog: pytest.LogCaptureFixture) -> None:
    court = Court(OSError("no more descriptors"))
    court.verdict.suspect_hang(SILENCE, 3)
    await asyncio.sleep(1)
    assert court.judged == [SILENCE]
    assert "no more descriptors" in caplog.text


@in_fake_time
async def test_once_closed_nothing_is_decided() -> None:
    court = Court()
    court.verdict.suspect_hang(SILENCE, 3)
    court.verdict.suspect(died(1), final=False)
    court.verdict.close()
    court.verdict.suspect(died(1, 7), final=True)
    await asyncio.sleep(10)
    assert court.judged == []
