"""One incarnation of a worker: a torchrun agent, its N ranks, their N links. It starts, serves and fails as a whole.

A half-dead process group is never repaired: whatever goes wrong, causes are gathered for a moment, the culprit is named,
every request in flight is answered, and everything is killed. The worker then starts another incarnation.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING, TypeVar

from minserve.errors import WireError, WorkerFailed
from minserve.telemetry.meters import unwatched
from minserve.wire.frames import Kind
from minserve.wire.messages import Failure, Loaded, Metrics, Progress, Shutdown, pack, unpack
from minserve.worker import launcher
from minserve.worker.acceptor import Acceptor, Expected
from minserve.worker.blame import AGENT, Cause, What
from minserve.worker.broadcast import Broadcast
from minserve.worker.inquest import Inquest
from minserve.worker.link import Link
from minserve.worker.loading import Loading
from minserve.worker.members import Members
from minserve.worker.site import Site
from minserve.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from pathlib import Path

    from minserve.dispatch.request import Request
    from minserve.errors import MinServeError
    from minserve.telemetry.events import EventKind
    from minserve.telemetry.meters import ModelMeters
    from minserve.wire.arena import Arena
    from minserve.wire.frames import Frame
    from minserve.worker.acceptor import Arrival
    from minserve.worker.devices import Devices
    from minserve.worker.endpoints import Endpoints
    from minserve.worker.recorder import Recorder
    from minserve.worker.spec import ModelSpec
    from minserve.worker.starter import Starter

logger = logging.getLogger(__name__)

T = TypeVar("T")
_OF_BATCHES = frozenset({Kind.REPLY, Kind.CHUNK, Kind.ERROR, Kind.DONE})


class RankGroup:
    """A rank group from its launch to its end. Use: `launch`, `connect`, `load`, then `has_place`/`send`, then `end`.

    Args:
        who: "model/worker number" for messages.
        slot: number of the worker within its model version; fixes its endpoints.
        directory: the model version's runtime directory.
        on_free: a place has come free, or a link has room again.
        on_lost, on_event, meters: see `Broadcast`.
        arena: for the model version's large bodies.

    Attributes:
        failed: done when the group has failed, with the error that requests get.
        cause: of that, or of a start that took too long.
    """

    def __init__(
        self,
        spec: ModelSpec,
        who: str,
        slot: int,
        directory: Path,
        devices: Devices,
        starter: Starter,
        on_free: Callable[[], None],
        on_lost: Callable[[list[Request], MinServeError, bool], None],
        on_event: Callable[[EventKind, str, int, int], None],
        meters: ModelMeters | None = None,
        arena: Arena | None = None,
    ) -> None:
        self._spec = spec
        self._who = who
        self._site = Site(spec, who, slot, directory, arena)
        self._devices = devices
        self._starter = starter
        self._on_free = on_free
        self._on_lost = on_lost
        self._on_event = on_event
        self._meters = unwatched() if meters is None else meters
        self._loop = asyncio.get_running_loop()
        self._incarnation = f"{spec.name}-{slot}-{secrets.token_hex(4)}"
        self._arrivals: list[Arrival] = []  # ranks whose sockets no link has taken over yet
        self._links: list[Link] = []
        self._members = Members(who, self._incarnation, AGENT if spec.config.is_parallel else 0, self._exited)
        self._loading = Loading(spec, who)
        self._inquest = Inquest(
            *(spec, who, self._site, self._members, self._loading),
            *(self._exceptions, self._silent, self._judged),
        )
        self._watchdog: Watchdog | None = None
        self._broadcast: Broadcast | None = None
        self._kill: asyncio.Task[None] | None = None
        self.failed: asyncio.Future[WorkerFailed] = self._loop.create_future()
        self.cause: Cause | None = None

    # ── start ──

    async def launch(self) -> None:
        """Binds the endpoints and starts torchrun.

        Raises:
            WorkerFailed: no ports, or the process cannot be started.
        """
        spec = self._spec
        endpoints = self._site.open()
        secret = secrets.token_hex(16)
        self._expected = Expected(spec.world_size, self._incarnation, secret)
        launch = launcher.plan(
            spec, endpoints, self._devices, self._site.path, self._incarnation, secret, self._starter.environ
        )
        await self._members.start(launch, self._starter, self._site)

    async def connect(self, accept_timeout: float) -> None:
        """Accepts exactly N ranks.

        Raises:
            WorkerFailed: not all have come in time, or one has died before.
        """
        acceptor = Acceptor(self._site.listeners, self._expected, self._rank_arrived, self._site.memory)
        try:
            arrivals = await self._unless_failed(acceptor.run(), accept_timeout)
        except TimeoutError:
            missing = ", ".join(map(str, acceptor.missing))
            text = f"{self._who}: rank {missing} did not connect within {accept_timeout:g} s"
            self.cause = Cause(What.SILENCE, acceptor.missing[0], 0, "did not connect", self._loop.time())
            raise WorkerFailed(text, self._inquest.last_lines(acceptor.missing)) from None
        self._starter.connected(self._who)
        for arrival in arrivals:
            link = Link(arrival.hello, self._received, self._taken, self._room, self._inquest.lost)
            await self._loop.connect_accepted_socket(lambda link=link: link, arrival.socket)  # type: ignore[misc]
            self._arrivals.remove(arrival)
            self._links.append(link)
        if self._site.memory is not None:
            self._site.memory.close_descriptors()
        self._site.outputs[AGENT].level = logging.DEBUG  # from here on torchrun only repeats what the ranks tell
        self._broadcast = Broadcast(
            *(self._loop, self._links, self._spec.limits, self._who, self._steps),
            *(self._on_free, self._inquest.broken, self._on_lost, self._on_event, self._meters),
            behind=self._behind,
            left=self._left,
            memory=self._site.memory,
        )

    async def load(self, timeout: float) -> None:
        """Sends LOAD to every rank and waits until each has answered, and has passed its probe if the handler offers one.

        Raises:
            WorkerFailed: a rank could not load, died, or took too long.
        """
        spec = self._spec
        pieces = self._loading.frame(gpu=self._devices.mask is not None)
        for link in self._links:
            link.write(pieces)
        try:
            await self._unless_failed(self._load_and_probe(), timeout)
        except TimeoutError:
            await self._inquest.signs()  # for the log: where each rank is
            behind = self._loading.behind
            stages = [f"rank {rank} (pid {self.pids[rank]}): {self.stage(rank)}" for rank in behind]
            at = ", ".join(stages) or "all are loaded, not all are probed"
            text = f"{self._who}: not loaded within {spec.startup_timeout:g} s ({at})"
            first = behind[0] if behind else 0
            self.cause = Cause(What.SILENCE, first, self.pids[first], "did not load", self._loop.time())
            raise WorkerFailed(text, self._inquest.last_lines(behind)) from None
        assert self._broadcast is not None
        assert self._site.board is not None
        self._watchdog = Watchdog(
            *(self._loop, self._links, self._broadcast, spec.limits, self._site.board.read, self._inquest.broken),
            spec.config.minserve.probe_interval if self._loading.probes else 0.0,
        )

    async def _load_and_probe(self) -> None:
        await self._loading.complete.wait()
        assert self._broadcast is not None
        if self._loading.in_flight:
            self._broadcast.set_places(self._loading.in_flight)
        if self._loading.probes:
            passed = asyncio.Event()
            self._broadcast.probe(passed.set)
            await passed.wait()

    async def _unless_failed(self, work: Coroutine[object, object, T], timeout: float) -> T:
        """Waits for `work`, no longer than `timeout`, and not at all once the group has failed."""
        task = self._loop.create_task(work)
        try:
            either: list[asyncio.Future[object]] = [task, self.failed]  # type: ignore[list-item]  # only waited for
            await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if self.failed.done():
                raise self.failed.result()
            if not task.done():
                raise TimeoutError
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    # ── serve: what the dispatcher sees ──

    def has_place(self, *, full: bool = True, ahead: int = 0) -> bool:
        """Whether a batch may be sent now, see `Lane`."""
        if self._broadcast is None or self._inquest.pending:
            return False
        return self._broadcast.has_place(full=full, ahead=ahead)

    @property
    def batch_seconds(self) -> float | None:
        """How long a batch usually takes; None before the first."""
        return self._broadcast.batch_seconds if self._broadcast is not None else None

    @property
    def under_way(self) -> int:
        """How many batches are."""
        return self._broadcast.under_way if self._broadcast is not None else 0

    def send(self, requests: list[Request]) -> None:
        """Sends a batch to all ranks."""
        assert self._broadcast is not None
        self._broadcast.send(requests)

    def record(self, recorder: Recorder | None) -> None:
        """From now on every batch is recorded, by nobody if None. A group that has not connected yet is to be told later."""
        if self._broadcast is not None:
            self._broadcast.recorder = recorder
            if recorder is not None:
                recorder.begin(self._incarnation)

    @property
    def agent_pid(self) -> int:
        """The pid of torchrun, or of the one process without it; 0 before the launch."""
        return self._members.agent_pid

    @property
    def pids(self) -> Mapping[int, int]:
        """Of the ranks that have said HELLO, by rank."""
        return self._members.pids

    def stage(self, rank: int) -> str:
        """How far a rank's load is, in words."""
        return self._loading.stage(rank)

    @property
    def endpoints(self) -> Endpoints | None:
        """Where its ranks connect; None before the launch."""
        return self._site.endpoints

    @property
    def suspected(self) -> bool:
        """Whether something is wrong, whoever is to blame."""
        return self._inquest.pending

    @property
    def busy(self) -> bool:
        """Whether a batch is under way that somebody has asked for."""
        return self._broadcast is not None and self._broadcast.working

    @property
    def through(self) -> bool:
        """Whether every rank is through with all that rank 0 is."""
        board, broadcast = self._site.board, self._broadcast
        if board is None or broadcast is None:
            return True
        return all(board.read(link.rank).finished >= broadcast.replied for link in self._links)

    @property
    def answers_held(self) -> int:
        """Bytes of its answers in shared memory that clients have not got yet."""
        memory = self._site.memory
        return memory.held if memory is not None else 0

    @property
    def served(self) -> bool:
        """Whether it has carried a batch through."""
        return self._broadcast is not None and self._broadcast.batches_done > 0

    # ── end ──

    async def end(self, exit_timeout: float) -> None:
        """Ends every process: asks with SHUTDOWN if all ranks are well, waits `exit_timeout`, then kills."""
        self._inquest.adjourn()
        if self._links and not self.failed.done():
            for link in self._links:
                link.write([pack(Kind.SHUTDOWN, Shutdown("the worker ends"))])
            await self._members.ranks_gone(exit_timeout)
        await self.kill()

    async def kill(self) -> None:
        """Kills every process, answers what is in flight, leaves nothing behind. May be called at any time, also again."""
        if self._kill is None:
            self._kill = self._loop.create_task(self._kill_all())
        await asyncio.shield(self._kill)

    async def _kill_all(self) -> None:
        self._inquest.close()
        if self._watchdog is not None:
            self._watchdog.stop()
        stopped = WorkerFailed(f"{self._who}: the worker was stopped")
        if self._broadcast is not None:
            self._broadcast.fail_all(stopped, self._begun())
        await self._members.kill()
        if self._broadcast is not None:
            self._broadcast.fail_rest(self.failed.result() if self.failed.done() else stopped, self._begun())
        for link in self._links:
            link.close()
        for arrival in self._arrivals:
            arrival.socket.close()
        self._site.close()

    # ── what the sockets, the board and the kernel tell ──

    def _begun(self) -> int:
        board = self._site.board
        return max((board.read(link.rank).received for link in self._links), default=0) if board is not None else 0

    def _behind(self, rank: int, seq: int) -> bool:
        if self._site.board is None:
            return False
        vitals = self._site.board.read(rank)
        return vitals.finished < vitals.received < seq

    def _left(self, rank: int, seq: int) -> bool:
        return self._site.board is not None and self._site.board.read(rank).finished >= seq

    def _steps(self, rank: int, seq: int) -> int:
        return self._site.board.read(rank).step_of(seq) if self._site.board is not None else 0

    def _rank_arrived(self, arrival: Arrival) -> None:
        self._members.add(arrival.hello.rank, arrival.hello.pid)
        self._arrivals.append(arrival)

    def _received(self, link: Link, frame: Frame) -> None:
        if frame.kind in _OF_BATCHES:  # first what comes most, in one look-up: each `Kind.X` costs as much as a call
            if not self._loading.complete.is_set() or self._broadcast is None:
                raise WireError(f"{frame.kind.name} before every rank has loaded")
            if not self.failed.done():
                self._broadcast.received(link, frame)
        elif frame.kind is Kind.PROGRESS:
            self._loading.progressed(link.rank, unpack(Progress, frame.meta))
        elif frame.kind is Kind.LOADED:
            self._loading.loaded(link.rank, unpack(Loaded, frame.meta))
        elif frame.kind is Kind.METRICS:
            self._meters.from_rank(link.rank, unpack(Metrics, frame.meta).metrics)
        elif frame.kind is Kind.FAILED:
            failure = unpack(Failure, frame.meta)
            self._loading.failed(link.rank, failure)
            self._inquest.load_failed(link, failure)

    def _taken(self) -> None:
        if self._broadcast is not None:
            self._broadcast.taken()

    def _room(self) -> None:
        if self._broadcast is not None:
            self._broadcast.room_changed()

    def _exited(self, rank: int, pid: int, code: int | None) -> None:
        self._inquest.exited(rank, pid, code)

    # ── what the inquest asks and finds ──

    def _exceptions(self) -> list[Cause]:
        return self._broadcast.causes if self._broadcast is not None else []

    def _silent(self) -> list[float]:
        return self._watchdog.silent if self._watchdog is not None else []

    def _judged(self, cause: Cause, error: WorkerFailed) -> None:
        self.cause = cause
        self.failed.set_result(error)
        if self._broadcast is not None:
            self._broadcast.fail_all(error, self._begun())
