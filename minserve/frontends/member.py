"""One of the frontend processes, through all its lives."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from minserve.errors import StartupError
from minserve.frontends.channel import Channel
from minserve.frontends.door import Door
from minserve.frontends.handover import Handover
from minserve.wire.frames import FROM_FRONTEND, Kind
from minserve.worker.processes import Watch, die_with
from minserve.worker.retry import RetryWindow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp import web

    from minserve.frontends.messages import Start
    from minserve.frontends.shared import Shared
    from minserve.wire.frames import Frame

logger = logging.getLogger(__name__)

BACKOFF_S = (0.0, 1.0, 2.0, 3.0, 5.0)
STABLE_S = 60.0
START_TIMEOUT_S = 60.0  # a process that does HTTP alone is there in one or two
PULSE_S = 2.0
SILENT_PULSES = 5  # counted, not timed: a server that was stopped itself has not asked meanwhile


class Member:
    """One process. When it ends by itself another takes its place.

    Args:
        start: what it is told.
        listener: the socket that it accepts on.
        door: makes the server's end of a channel to it.
        server: makes a protocol for each connection of a request that is no prediction.

    Attributes:
        opened: set while it accepts clients.
        ended: set while there is no process.
        channel: to its present life.
    """

    def __init__(
        self,
        start: Start,
        listener: socket.socket,
        shared: Shared,
        door: Callable[[Channel], Door],
        server: web.Server,
        environ: Mapping[str, str],
    ) -> None:
        self._start = start
        self._listener = listener
        self._shared = shared
        self._make_door = door
        self._server = server
        self._environ = environ
        self._loop = asyncio.get_running_loop()
        self._window = RetryWindow(self._loop, BACKOFF_S, math.inf, STABLE_S, None)
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._gathered: asyncio.Future[None] | None = None
        self._pulse: asyncio.TimerHandle | None = None
        self._silent = 0
        self.opened = asyncio.Event()
        self.ended = asyncio.Event()
        self.ended.set()

    # ── its life ──

    async def start(self) -> None:
        """Starts it, and waits until it accepts clients.

        Raises:
            StartupError: it has ended before that, or takes too long.
        """
        await self._spawn()
        waits = [asyncio.create_task(event.wait()) for event in (self.opened, self.ended)]
        try:
            await asyncio.wait(waits, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not self.opened.is_set():
            what = "has ended as it started" if self.ended.is_set() else f"is not ready after {START_TIMEOUT_S:g} s"
            raise StartupError(f"frontend process {self._start.number} {what}, see above")

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        handed_over, handing_over = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, handing_over:
                self._process = self._launch(theirs)
                descriptors = [self._listener.fileno(), handing_over.fileno(), self._shared.descriptor]
                socket.send_fds(ours, [b"\0"], descriptors)
        except OSError:
            ours.close()
            handed_over.close()
            raise
        ours.setblocking(False)
        self._handover = Handover(handed_over, self._server)
        self.ended.clear()
        self.channel = Channel(FROM_FRONTEND, self._received, self._lost)
        self._door = self._make_door(self.channel)
        self._watch = Watch(self._process.pid, self._exited)
        await self._loop.create_unix_connection(lambda: self.channel, sock=ours)
        self.channel.send(Kind.START, message=self._start)

    def _launch(self, channel: socket.socket) -> subprocess.Popen[bytes]:
        server = os.getpid()
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "minserve.frontends"],  # -P: a local `queue.py` is not Python's
            stdin=channel.fileno(),
            stdout=subprocess.DEVNULL,
            env=self._environ,
            start_new_session=True,  # Ctrl-C on the terminal is for the server
            preexec_fn=lambda: die_with(server),
        )

    def stop(self) -> None:
        """Lets it finish what is in flight, and end."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        if self.opened.is_set():
            self.channel.send(Kind.STOP)
        elif not self.ended.is_set():
            self._process.kill()

    def kill(self) -> None:
        """Ends it at once."""
        self.stop()
        if not self.ended.is_set():
            self._process.kill()

    # ── what it sends ──

    async def gather(self) -> None:
        """Waits until it has told what it has measured until now."""
        if self._gathered is not None:  # perhaps its answer is under way, with less in it
            await asyncio.shield(self._gathered)
        if self.opened.is_set():
            await asyncio.shield(self._ask())  # several may wait

    def _ask(self) -> asyncio.Future[None]:
        if self._gathered is None:
            self._gathered = self._loop.create_future()
            self.channel.send(Kind.GATHER, 1)
        return self._gathered

    def _feel_pulse(self) -> None:
        """Kills it when it answers nothing any more: its clients shall see a closed connection, and not wait for ever."""
        self._silent = 0 if self._gathered is None else self._silent + 1
        if self._silent >= SILENT_PULSES:
            self._lost(f"has given no sign of life for {SILENT_PULSES * PULSE_S:g} s")
            return
        self._ask()
        self._pulse = self._loop.call_later(PULSE_S, self._feel_pulse)

    def _received(self, frame: Frame) -> None:
        if frame.kind is Kind.OPEN:
            self._window.ready()
            self.opened.set()
            self._silent = 0
            self._feel_pulse()
            return
        self._door.received(frame)
        if frame.kind is Kind.RECORDED and frame.seq:
            self._all_gathered()

    def _all_gathered(self) -> None:
        if self._gathered is not None:
            self._gathered.set_result(None)
            self._gathered = None

    # ── its end ──

    def _lost(self, reason: str) -> None:
        if reason:
            logger.error("frontend process %d (pid %d): %s", self._start.number, self._process.pid, reason)
        self._process.kill()  # if it has not ended: it is of no use to anybody

    def _exited(self, code: int | None) -> None:
        pid, number = self._process.pid, self._start.number
        code = self._process.wait()
        self.opened.clear()
        self.ended.set()
        if self._pulse is not None:
            self._pulse.cancel()
        self.channel.abort()
        self._door.close()
        self._handover.close()
        self._shared.forget(number)
        self._all_gathered()
        if self._stopping:
            return
        delay = self._window.failed(served=False) or 0.0
        logger.error(
            "frontend process %d (pid %d) exited with code %d; its clients have lost their connections, the others serve "
            "on; another starts in %g s",
            *(number, pid, code, delay),
        )
        self._timer = self._loop.call_later(delay, self._again)

    def _again(self) -> None:
        self._timer = None
        self._spawning = asyncio.create_task(self._spawn_again())

    async def _spawn_again(self) -> None:
        if self._stopping:
            return
        try:
            await self._spawn()
        except OSError as error:
            logger.error("frontend process %d cannot be started: %s", self._start.number, error.strerror)
            self._timer = self._loop.call_later(BACKOFF_S[-1], self._again)
