# short looks at processes, with nothing else on the loop

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from minserve.worker import starter
from minserve.worker.launcher import Launch
from minserve.worker.starter import Starter
from minserve.worker.warm import Forked, NotWarmError

pytestmark = pytest.mark.asyncio

PLAIN = Launch(("true",), {}, Path("/"))
ALONE = dataclasses.replace(PLAIN, warm=())
GROUP = dataclasses.replace(PLAIN, warm=("--nnodes", "1"), patient=True)


class FakeLauncher:
    made: ClassVar[list["FakeLauncher"]] = []
    fails: ClassVar[str] = ""

    def __init__(self, environ: Mapping[str, str], directory: Path) -> None:
        if self.fails == "start":
            raise OSError(12, "Cannot allocate memory")
        self.ready = self.ended = self.useless = self.closed = False
        self.forked: list[Launch] = []
        FakeLauncher.made.append(self)

    async def fork(self, launch: Launch) -> Forked:
        self.ready = True
        if self.fails:
            raise NotWarmError(self.fails)
        self.forked.append(launch)
        return Forked(4711, -1)

    async def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def fake_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "WarmLauncher", FakeLauncher)
    monkeypatch.setattr(FakeLauncher, "made", [])


async def started(processes: Starter, launch: Launch, *, connects: bool = True) -> bool:
    """Starts it; whether it was forked."""
    child = await processes.start(launch, "m/0")
    if child.output >= 0:
        os.close(child.output)
        child.reap()
    if connects:
        processes.connected("m/0")
    return child.pid == 4711


@pytest.fixture
def processes() -> Starter:
    return Starter({"PATH": os.environ["PATH"]}, Path("/run"))


async def test_a_group_is_worth_a_launcher_and_a_single_process_takes_what_is_there(processes: Starter) -> None:
    assert not await started(processes, ALONE)
    assert FakeLauncher.made == []
    assert await started(processes, GROUP)
    assert await started(processes, ALONE)
    assert not await started(processes, PLAIN), "the user, or an option, says torchrun"
    assert [launcher.forked for launcher in FakeLauncher.made] == [[GROUP, ALONE]]
    await processes.close()
    assert FakeLauncher.made[0].closed


async def test_what_cannot_be_forked_is_started_all_the_same_and_the_log_says_why(
    processes: Starter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeLauncher, "fails", "it has a json of its own")
    assert not await started(processes, GROUP)
    assert "m/0: started without the warm launcher: it has a json of its own" in caplog.text


async def test_after_a_fork_that_did_not_connect_comes_one_plain_start(
    processes: Starter, caplog: pytest.LogCaptureFixture
) -> None:
    """So what no fork can do on this machine costs one start, not the model."""
    assert await started(processes, GROUP, connects=False)
    assert not await started(processes, GROUP)
    assert "m/0: started without the warm launcher: what it had forked did not connect" in caplog.text
    assert await started(processes, GROUP)
    assert await started(processes, GROUP)


async def test_a_launcher_that_cannot_be_started_is_done_without(
    processes: Starter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeLauncher, "fails", "start")
    assert not await started(processes, GROUP)
    assert "cannot be started: [Errno 12] Cannot allocate memory" in caplog.text
    monkeypatch.setattr(FakeLauncher, "fails", "")
    assert await started(processes, GROUP), "that may pass"


@pytest.mark.parametrize("useless", [False, True])
async def test_one_that_has_died_is_replaced_but_not_one_that_never_came_up(
    processes: Starter, useless: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert await started(processes, GROUP)
    launcher = FakeLauncher.made[0]
    launcher.ended, launcher.useless, launcher.ready = True, useless, False
    assert not await started(processes, ALONE)
    assert await started(processes, GROUP) is not useless
    assert len(FakeLauncher.made) == 2 - useless
    assert caplog.text == "", "that was told when it happened"
