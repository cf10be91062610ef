import random

import pytest

from minserve.worker.blame import AGENT, Cause, What, culprit, describe_exit


def died(rank: int, code: int | None, at: float) -> Cause:
    return Cause(What.DEATH, rank, 100 + rank, describe_exit(code), at, code)


def raised(rank: int, at: float) -> Cause:
    return Cause(What.EXCEPTION, rank, 100 + rank, "raised ValueError: x", at)


def in_collective(rank: int, at: float) -> Cause:
    return Cause(What.COLLECTIVE, rank, 100 + rank, "raised DistBackendError: x", at)


def reported(rank: int, code: int, at: float) -> Cause:
    return Cause(What.DEATH, rank, 100 + rank, describe_exit(code), at, code, reported=True)


SILENCE = Cause(What.SILENCE, 0, 100, "did not finish batch 3 within 10 s", 0.0)
PROTOCOL = Cause(What.PROTOCOL, 3, 103, "broke the protocol: seq", 9.0)


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (died(1, 7, 2), [died(0, -15, 1), died(2, -15, 1.5)]),  # SIGTERM'ed siblings are seen first
        (died(1, -15, 1), [died(0, -15, 2)]),  # nothing but SIGTERM: the earliest
        (died(1, 7, 1), [died(0, -9, 2)]),  # two real deaths: the earliest
        (died(1, -9, 2), [died(AGENT, 1, 1), died(0, -15, 1.5)]),  # torchrun's exit 1 is a consequence
        (died(AGENT, -9, 3), [died(0, -9, 1), died(1, -9, 2)]),  # its ranks die with it, by PR_SET_PDEATHSIG
        (died(AGENT, -15, 3), [died(0, -15, 1), died(1, -15, 2)]),  # somebody terminated torchrun
        (
            reported(1, -15, 2),
            [died(0, -15, 1), died(AGENT, 1, 3)],
        ),  # torchrun, which ends the others so, has seen it first
        (died(0, 7, 1), [reported(1, -15, 2), died(AGENT, 1, 3)]),
        (died(1, None, 2), [died(AGENT, 1, 1), died(0, -15, 1)]),  # an unreadable end is no SIGTERM
        (died(1, 0, 5), [raised(0, 1), in_collective(2, 1)]),  # a death outranks exceptions
        (died(0, -15, 5), [raised(1, 1)]),
        (raised(1, 3), [in_collective(0, 1), in_collective(2, 2)]),  # an own one outranks the victims'
        (raised(2, 1), [raised(0, 2)]),
        (in_collective(1, 1), [in_collective(0, 2)]),
        (SILENCE, [in_collective(1, 1), in_collective(2, 2)]),  # whoever says nothing is no victim
        (PROTOCOL, [died(0, -9, 1), died(AGENT, -9, 1), raised(1, 1)]),  # nothing that it did later counts
        (SILENCE, []),
    ],
)
def test_the_cause_that_explains_the_others_wins_in_whatever_order_they_come(first: Cause, others: list[Cause]) -> None:
    causes = [first, *others]
    for _ in range(6):
        random.Random(_).shuffle(causes)
        assert culprit(causes) is first


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (7, "exited with code 7"),
        (0, "exited with code 0"),
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),  # a real-time signal without a name
        (None, "vanished"),
    ],
)
def test_a_death_in_words(code: int | None, words: str) -> None:
    assert describe_exit(code) == words


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (died(1, 7, 0), "rank 1 (pid 101) exited with code 7"),
        (died(AGENT, -9, 0), "torchrun (pid 99) was killed by SIGKILL"),
        (Cause(What.DEATH, 2, 0, "vanished", 0), "rank 2 vanished"),
    ],
)
def test_a_cause_names_its_rank_and_pid(cause: Cause, words: str) -> None:
    assert str(cause) == words
