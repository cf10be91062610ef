# ruff: noqa: ASYNC220  # tiny processes, with nothing else on the loop
import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from minserve.worker import reaper
from minserve.worker.processes import Watch, children, has_ended
from minserve.worker.reaper import Reaper
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def adopting(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reaper]:
    monkeypatch.setattr(reaper, "UNCLAIMED_S", 0.01)
    started = Reaper()
    yield started
    started.close()


class Orphans:
    """Processes whose parents have ended. They end when they are told to, at the latest with the test."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def start(self) -> int:
        command = ["sh", "-c", "exec 3<&0; cat <&3 >&2 & echo $!"]
        with subprocess.Popen(command, stdin=self._reader, stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            return int(parent.stdout.read())

    def end(self) -> None:
        os.close(self._writer)
        self._writer = os.open(os.devnull, os.O_WRONLY)

    def close(self) -> None:
        os.close(self._writer)
        os.close(self._reader)


@pytest.fixture
def orphans() -> Iterator[Orphans]:
    started = Orphans()
    yield started
    started.close()


def exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


async def test_an_orphan_becomes_our_child_and_is_reaped_when_it_ends(adopting: Reaper, orphans: Orphans) -> None:
    pid = orphans.start()
    assert pid in children(os.getpid())
    orphans.end()
    await until(lambda: not exists(pid))
    assert pid not in children(os.getpid())
    await until(lambda: adopting._timer is None)  # no child left, nothing to look for


async def test_one_that_ended_while_another_was_looked_at_is_reaped_too(adopting: Reaper, orphans: Orphans) -> None:
    pids = [orphans.start() for _ in range(5)]
    assert set(pids) <= set(children(os.getpid()))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0)
    await until(lambda: not any(map(exists, pids)))


@pytest.mark.parametrize("delay", [0.0, 0.001])
async def test_no_status_is_taken_from_those_who_wait_for_it(
    delay: float, adopting: Reaper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short the patience: between two looks at the children the loop polls, and whoever watches one is told."""
    monkeypatch.setattr(reaper, "UNCLAIMED_S", delay)
    codes: list[int | None] = []
    processes = []
    for code in range(1, 21):
        process = subprocess.Popen(["sh", "-c", f"exit {code}"])
        Watch(process.pid, lambda _, process=process: codes.append(process.wait()))  # type: ignore[misc]
        processes.append(process)
        await asyncio.sleep(0)
    await until(lambda: len(codes) == 20)
    assert sorted(code or 0 for code in codes) == list(range(1, 21))


async def test_a_thread_that_waits_for_a_child_gets_its_status(adopting: Reaper) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(subprocess.run(["sh", "-c", "exit 7"]).returncode))
    thread.start()
    await until(lambda: codes)
    thread.join()
    assert codes == [7]


async def test_after_its_end_nothing_is_adopted_and_the_signal_is_as_before(orphans: Orphans) -> None:
    Reaper().close()
    pid = orphans.start()
    assert exists(pid)
    assert pid not in children(os.getpid())
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


async def test_a_child_that_waits_to_be_reaped_has_ended() -> None:
    process = subprocess.Popen(["true"])
    await until(lambda: has_ended(process.pid))
    assert process.pid in children(os.getpid())
    process.wait()
    assert not has_ended(process.pid)
    assert not has_ended(os.getpid())
