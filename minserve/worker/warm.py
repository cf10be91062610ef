"""The server's side of the warm launcher (rank/warm.py): starts it, tells it what to fork, sees its end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.errors import WireError
from minserve.wire.launching import MAX_PACKET, Ready, Refused, Start, Started, decode_answer, encode
from minserve.worker import launcher
from minserve.worker.blame import describe_exit
from minserve.worker.output import Output
from minserve.worker.processes import Watch, kill_leftovers, kill_tree

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

    from minserve.wire.launching import Answer
    from minserve.worker.launcher import Launch

logger = logging.getLogger(__name__)

READY_S = 30.0  # importing torch takes two; from a cold disk, on a busy machine, more
ANSWER_S = 5.0  # a fork takes milliseconds
END_S = 0.5  # from the end of its socket to its own
# Room for the environments of forks, which take the place of the launcher's own in /proc/<pid>/environ.
_ROOM = "-" * 2048


class NotWarmError(Exception):
    """The launcher cannot do it; a plain launch can."""


@dataclass(frozen=True, slots=True)
class Forked:
    """A process that the launcher has forked: this server's child. `output` is what it prints, a non-blocking pipe."""

    pid: int
    output: int


class WarmLauncher:
    """One process, for the life of the server or its own.

    Args:
        environ: what models' processes have.
        directory: for its environment, by which the guardian knows it; in the server's runtime directory.
    """

    def __init__(self, environ: Mapping[str, str], directory: Path) -> None:
        self._environ = environ
        added = {
            "MINSERVE_DIRECTORY": str(directory),
            "MINSERVE_WORKER": _ROOM,
            "OMP_NUM_THREADS": "1",  # with more numpy would start threads when it is imported
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_PACKET)
        self._socket = ours
        command = (sys.executable, "-u", "-m", "minserve.rank.warm", str(theirs.fileno()))
        try:
            with theirs:
                self._process: subprocess.Popen[bytes] = launcher.spawn(
                    launcher.Launch(command, added, Path("/")), environ, (theirs.fileno(),)
                )
        except OSError:
            ours.close()
            raise
        assert self._process.stdout is not None
        self._output = Output(os.dup(self._process.stdout.fileno()), "warm launcher")
        self._process.stdout.close()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(ours, self._readable)
        self._watch = Watch(self._process.pid, self._exited)
        self._is_ready: asyncio.Future[bool] = self._loop.create_future()
        self._answers: deque[asyncio.Future[Answer | None]] = deque()  # None: it has died
        self._dismissed = self._gave_up = self._late = False
        logger.debug("warm launcher: pid %d", self._process.pid)

    @property
    def ready(self) -> bool:
        """Whether it forks at once."""
        return self._is_ready.done() and self._is_ready.result() and not self._watch.ended.is_set()

    @property
    def ended(self) -> bool:
        """Whether there must be another one."""
        return self._watch.ended.is_set()

    @property
    def useless(self) -> bool:
        """Whether it has ended by itself before it was ready, as another one would."""
        return self._gave_up

    async def close(self) -> None:
        """Ends it. What it has forked goes on."""
        self._dismissed = True
        if not self.ended:
            self._process.kill()
            await self._watch.ended.wait()

    async def fork(self, launch: Launch) -> Forked:
        """Forks what `launch` would start.

        Raises:
            NotWarmError: it cannot. Nothing has been started then.
        """
        await self._until_ready()
        environ = {**self._environ, **launch.added}
        entries = tuple(os.fsencode(f"{name}={value}") for name, value in environ.items())
        start = Start(launch.warm or (), entries, os.fsencode(launch.directory))
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                socket.send_fds(self._socket, [encode(start)], [writer])
            finally:
                os.close(writer)
            answer = await self._answer(launch.added["MINSERVE_WORKER"])
        except OSError as error:
            os.close(reader)
            raise NotWarmError(f"the warm launcher cannot be told: {error.strerror}") from None
        except BaseException:
            os.close(reader)
            raise
        if not isinstance(answer, Started):
            os.close(reader)
            raise NotWarmError(answer.reason if isinstance(answer, Refused) else "it said READY twice")
        os.set_blocking(reader, False)
        return Forked(answer.pid, reader)

    async def _until_ready(self) -> None:
        try:
            async with asyncio.timeout(0 if self._late else READY_S):
                ready = await asyncio.shield(self._is_ready)
        except TimeoutError:
            self._late = True  # no other start waits as long once more
            raise NotWarmError(f"the warm launcher was not ready within {READY_S:g} s") from None
        if not ready or self.ended:
            raise NotWarmError("the warm launcher has died")

    async def _answer(self, incarnation: str) -> Answer:
        answer: asyncio.Future[Answer | None] = self._loop.create_future()
        self._answers.append(answer)
        try:
            async with asyncio.timeout(ANSWER_S):
                told = await asyncio.shield(answer)
        except TimeoutError:
            logger.warning("the warm launcher (pid %d) does not answer and is killed", self._process.pid)
            self._process.kill()
            await self._watch.ended.wait()
            told = None
        except asyncio.CancelledError:
            answer.add_done_callback(_end)  # nobody waits for it any more
            raise
        if told is None:
            kill_leftovers(incarnation)  # it may have died between the fork and the answer
            raise NotWarmError("the warm launcher has died")
        return told

    def _readable(self) -> None:
        try:
            packet = self._socket.recv(MAX_PACKET)
            answer = decode_answer(packet) if packet else None
        except BlockingIOError:
            return
        except (OSError, WireError) as error:
            logger.warning("warm launcher: %s", error)
            answer = None
        if isinstance(answer, Ready):
            self._is_ready.set_result(True)
        elif answer is not None:
            self._answers.popleft().set_result(answer)
        else:  # most likely it ends just now, and its exit code says more than that it was killed
            self._loop.remove_reader(self._socket)
            self._loop.call_later(END_S, self._process.kill)

    def _exited(self, code: int | None) -> None:
        self._process.wait()  # it is a zombie now, so this does not block
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._output.close()
        if not self._dismissed:
            logger.warning(
                "the warm launcher (pid %d) %s; no worker ends of that", self._process.pid, describe_exit(code)
            )
        if not self._is_ready.done():
            self._is_ready.set_result(False)
            self._gave_up = code is not None and code >= 0
        for answer in self._answers:
            answer.set_result(None)


def _end(answer: asyncio.Future[Answer | None]) -> None:
    """Kills what has been forked for nobody."""
    if not answer.cancelled() and isinstance(told := answer.result(), Started):
        kill_tree(told.pid, ())
