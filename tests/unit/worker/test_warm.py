"""The server's side, over a real socket, with a launcher that behaves as the test says."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
import pytest_asyncio

from minserve.worker import launcher, warm
from minserve.worker.launcher import Launch
from minserve.worker.warm import NotWarmError, WarmLauncher
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

LAUNCH = Launch(("python", "-m", "x"), {"MINSERVE_WORKER": "m-0", "A": "ours"}, Path("/"), ("--nnodes", "1"))
FAKE = """
import os, signal, socket, sys
from minserve.wire.launching import *
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
connection = socket.socket(fileno=int(sys.argv[1]))
def serve(answer):
    connection.send(encode(Ready()))
    while True:
        packet, files, _, _ = socket.recv_fds(connection, MAX_PACKET, 1)
        if not packet:
            return
        start = decode_start(packet)
        connection.send(answer(start, files[0]))
        for file in files: os.close(file)
def fork(start, output):
    child = os.fork()
    if child == 0:
        os.write(output, repr((start.torchrun, start.directory, dict(e.split(b"=", 1) for e in start.environ))).encode())
        os.close(output)
        signal.pause()
    return encode(Started(child))
"""


class Fake:
    """Makes launchers that do what their `behaviour`, a piece of Python, says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.behaviour = "serve(fork)"
        self.made: list[WarmLauncher] = []
        self.pids: list[int] = []
        self._spawn = launcher.spawn
        monkeypatch.setattr(launcher, "spawn", self._spawned)

    def _spawned(
        self, launch: Launch, environ: Mapping[str, str], inherited: tuple[int, ...]
    ) -> subprocess.Popen[bytes]:
        assert launch.command[1:4] == ("-u", "-m", "minserve.rank.warm")
        command = (sys.executable, "-c", FAKE + self.behaviour, launch.command[-1])
        process = self._spawn(Launch(command, launch.added, launch.directory), environ, inherited)
        self.pids.append(process.pid)
        return process

    def launcher(self) -> WarmLauncher:
        made = WarmLauncher({**os.environ, "A": "theirs"}, Path("/run/warm"))
        self.made.append(made)
        return made


@pytest_asyncio.fixture
async def fake(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fake]:
    fake = Fake(monkeypatch)
    yield fake
    for made in fake.made:
        await made.close()
        assert made.ended


async def test_it_is_told_what_to_fork_and_the_fork_prints_into_a_pipe(fake: Fake) -> None:
    warm = fake.launcher()
    forked = await warm.fork(LAUNCH)
    assert warm.ready
    said = b""
    while not said.endswith(b"})"):
        await asyncio.sleep(0)
        try:
            said += os.read(forked.output, 65536)
        except BlockingIOError:
            continue
    assert said.startswith(b"(('--nnodes', '1'), b'/', {")
    assert b"b'A': b'ours'" in said
    assert b"b'PATH': " in said
    os.kill(forked.pid, signal.SIGKILL)
    os.close(forked.output)


async def test_two_starts_at_one_time_get_each_its_own(fake: Fake) -> None:
    warm = fake.launcher()
    forked = await asyncio.gather(warm.fork(LAUNCH), warm.fork(LAUNCH))
    assert len({one.pid for one in forked}) == 2
    for one in forked:
        os.kill(one.pid, signal.SIGKILL)
        os.close(one.output)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("serve(lambda start, output: encode(Refused('no room')))", "no room"),
        ("serve(lambda start, output: os._exit(1))", "has died"),
        ("serve(lambda start, output: b'rubbish')", "has died"),
        ("raise ImportError('no torch')", "has died"),
    ],
)
async def test_what_it_does_not_fork_is_said_and_leaves_nothing_open(fake: Fake, behaviour: str, reason: str) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    fake.behaviour = behaviour
    warm = fake.launcher()
    with pytest.raises(NotWarmError, match=reason):
        await warm.fork(LAUNCH)
    await warm.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert warm.useless == behaviour.startswith("raise")


async def test_one_that_does_not_answer_is_killed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "ANSWER_S", 0.05)
    fake.behaviour = "serve(lambda start, output: signal.pause())"
    mute = fake.launcher()
    with pytest.raises(NotWarmError, match="has died"):
        await mute.fork(LAUNCH)
    assert mute.ended
    assert not mute.useless, "another one may do better"


async def test_one_that_is_not_ready_in_time_is_waited_for_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "READY_S", 0.05)
    fake.behaviour = "signal.pause()"
    stuck = fake.launcher()
    with pytest.raises(NotWarmError, match="not ready"):
        await stuck.fork(LAUNCH)
    monkeypatch.setattr(warm, "READY_S", 3600.0)
    async with asyncio.timeout(5.0):
        with pytest.raises(NotWarmError, match="not ready"):
            await stuck.fork(LAUNCH)


async def test_what_nobody_waits_for_any_more_is_ended(fake: Fake) -> None:
    fake.behaviour = "import time\nserve(lambda start, output: (time.sleep(0.2), fork(start, output))[1])"
    warm = fake.launcher()
    waits = asyncio.create_task(warm.fork(LAUNCH))
    await until(lambda: warm._answers)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    later = await warm.fork(LAUNCH)
    children = Path(f"/proc/{fake.pids[0]}/task/{fake.pids[0]}/children")
    await until(lambda: children.read_text().split() == [str(later.pid)])
    os.kill(later.pid, signal.SIGKILL)
    os.close(later.output)


async def test_its_end_is_told_unless_the_server_brought_it_about(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    one, two = fake.launcher(), fake.launcher()
    await one._until_ready()
    os.kill(fake.pids[0], signal.SIGKILL)
    await until(lambda: one.ended)
    assert f"the warm launcher (pid {fake.pids[0]}) was killed by SIGKILL" in caplog.text
    await two.close()
    assert str(fake.pids[1]) not in caplog.text
