"""Whether every rank gets every request, once and in the same order: numbered requests, and what each rank wrote down."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS
from tests.benchmarks.peers.torchserve import TORCHSERVE
from tests.benchmarks.programs import ProgramError
from tests.benchmarks.report import Aim, Findings, absolute
from tests.benchmarks.servers import ask
from tests.benchmarks.workspace import HANDLERS, Model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.benchmarks.run import Run

SCENARIO = "delivery, 2 ranks, no collective"
REQUESTS = 2000
CLIENTS = 8
SETTLE_S = 2.0
POLL_S = 0.1
FIRST = b"start"
SHOWN = 60  # bytes of a wrong answer


def measure(run: Run) -> Findings:
    """The same numbers to both servers."""
    ours, theirs = _deliver(run, OURS), _deliver(run, TORCHSERVE)
    assert ours is not None  # or it has raised
    other = f"{TORCHSERVE}: not measured" if theirs is None else f"{TORCHSERVE} {theirs}"
    what = f"of {REQUESTS:,} requests those that rank 1 missed, got twice or in another order than rank 0"
    row = absolute(SCENARIO, what, "", [ours], Aim("≤", 0), headline=True, other=other)
    return Findings([row], footnotes=[_footnote(theirs)] if theirs else [])


def _footnote(wrong: int) -> str:
    return (
        "TorchServe's figures with ranks are of a server that does not give every request to every rank: of "
        f"{REQUESTS:,}, each answered with 200, {wrong} did not reach rank 1 once and in order. A collective in each batch "
        "hides it."
    )


def _deliver(run: Run, name: str) -> int | None:
    """How many deliveries to rank 1 were wrong. None: not measured, and a note says why."""
    folder = run.workspace.new_folder("numbers")
    model = Model("numbered", (HANDLERS / "numbered.py",), more=f"handler:\n  folder: {folder}\n")
    wrong = None
    with run.forgive(name), run.server(name, [model], FIRST) as up:
        run.plan.tell(f"{REQUESTS} numbered requests to {name}")
        _send(up.url(model.name))
        wrong = _read(folder)
        run.plan.tell(f"{name}: wrong for rank 1: {wrong}")
    return wrong


def _send(url: str) -> None:
    def send(number: int) -> None:
        status, answer = ask(url, str(number).encode())
        if (status, answer) != (200, str(number).encode()):
            raise ProgramError(f"request {number} got {status} {answer[:SHOWN]!r}")

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(send, range(REQUESTS)))


def _read(folder: Path) -> int:
    """Waits until rank 1 has written all, or no more for a while, and compares it with rank 0."""
    deadline = time.monotonic() + SETTLE_S
    before = ""
    while len(_numbers(folder, 1)) < REQUESTS and time.monotonic() < deadline:
        now = (folder / "1").read_text()
        if now != before:
            before, deadline = now, time.monotonic() + SETTLE_S
        time.sleep(POLL_S)
    return count_wrong(_numbers(folder, 0), _numbers(folder, 1))


def count_wrong(first: Sequence[str], second: Sequence[str]) -> int:
    """How often the second list lacks what the first has, repeats it, or has it before what came earlier in the first."""
    place = {number: index for index, number in enumerate(first)}
    places = [place[number] for number in dict.fromkeys(second) if number in place]
    missed, repeated = len(place) - len(places), len(second) - len(set(second))
    return missed + repeated + sum(later < earlier for earlier, later in pairwise(places))


def _numbers(folder: Path, rank: int) -> list[str]:
    """What a rank wrote down, without the requests that only waited for the server to answer."""
    return [line for line in (folder / str(rank)).read_text().split() if line != FIRST.decode()]
