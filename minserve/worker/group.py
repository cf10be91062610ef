"""One incarnation of a worker: a torchrun agent, its N ranks, their N links. It starts, serves and fails as a whole.

A half-dead process group is never repaired: whatever goes wrong, causes are gathered for a moment, the culprit is named,
every request in flight is answered, and everything is killed. The worker then starts another incarnation.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from typing import TYPE_CHECKING, TypeVar

from minserve.errors import RankProtocolError, ResponseTimeout, WireError, WorkerFailed, WorkerOutOfMemory
from minserve.telemetry.meters import unwatched
from minserve.wire.frames import Kind
from minserve.wire.messages import Failure, Load, Loaded, Metrics, Progress, Shutdown, pack, pack_with_body, unpack
from minserve.worker import hang, launcher
from minserve.worker.acceptor import Acceptor, Expected
from minserve.worker.blame import AGENT, DEATH_GATHER_S, SOCKET_GATHER_S, Cause, What, describe_exit
from minserve.worker.broadcast import Broadcast
from minserve.worker.link import Link
from minserve.worker.oom import OutOfMemory
from minserve.worker.processes import Watch, kill_leftovers, kill_tree
from minserve.worker.signs import look
from minserve.worker.site import Site
from minserve.worker.verdict import HANGS, Verdict
from minserve.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from pathlib import Path

    from minserve.dispatch.request import Request
    from minserve.errors import MinServeError
    from minserve.telemetry.events import EventKind
    from minserve.telemetry.meters import ModelMeters
    from minserve.wire.frames import Frame
    from minserve.worker.acceptor import Arrival
    from minserve.worker.devices import Devices
    from minserve.worker.endpoints import Endpoints
    from minserve.worker.recorder import Recorder
    from minserve.worker.signs import Signs
    from minserve.worker.spec import ModelSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_OUT_OF_MEMORY = 137  # 128 + SIGKILL: how a shell, and so a container, tells of the kernel's out-of-memory killer
GONE_S = 5.0  # after SIGKILL; only a process stuck in the kernel takes longer
REPORT_GATHER_S = 5.0  # in which torchrun, which ends soon after one of its ranks, has told of the first that ended


class RankGroup:
    """A rank group from its launch to its end. Use: `launch`, `connect`, `load`, then `has_place`/`send`, then `end`.

    Args:
        who: "model/worker number" for messages.
        slot: number of the worker within its model version; fixes its endpoints.
        directory: the model version's runtime directory.
        on_free: a place has come free, or a link has room again.
        on_lost: the group has failed with these requests in flight.
        on_event, meters: see `Broadcast`.

    Attributes:
        failed: done when the group has failed, with the error that requests get.
        cause: of that, or of a start that took too long.
        pids: of the ranks that have said HELLO, by rank.
        progress: the latest report of each rank while it loads.
    """

    def __init__(
        self,
        spec: ModelSpec,
        who: str,
        slot: int,
        directory: Path,
        devices: Devices,
        environ: Mapping[str, str],
        on_free: Callable[[], None],
        on_lost: Callable[[list[Request], MinServeError], None],
        on_event: Callable[[EventKind, str, int, int], None],
        meters: ModelMeters | None = None,
    ) -> None:
        self._spec = spec
        self._who = who
        self._site = Site(spec, who, slot, directory)
        self._devices = devices
        self._environ = environ
        self._on_free = on_free
        self._on_lost = on_lost
        self._on_event = on_event
        self._meters = unwatched() if meters is None else meters
        self._loop = asyncio.get_running_loop()
        self._incarnation = f"{spec.name}-{slot}-{secrets.token_hex(4)}"
        self._arrivals: list[Arrival] = []  # ranks whose sockets no link has taken over yet
        self._links: list[Link] = []
        self._watches: list[Watch] = []
        self._loaded: dict[int, Loaded] = {}
        self._load_errors: dict[int, str] = {}  # by rank: type, text and place of what a handler raised in its load
        self._all_loaded = asyncio.Event()
        self._verdict = Verdict(self._exceptions, self._look_closer, self._judged)
        self._out_of_memory = OutOfMemory(self._loop)
        self._watchdog: Watchdog | None = None
        self._broadcast: Broadcast | None = None
        self._kill: asyncio.Task[None] | None = None
        self.agent_pid = 0
        self.failed: asyncio.Future[WorkerFailed] = self._loop.create_future()
        self.cause: Cause | None = None
        self.pids: dict[int, int] = {}
        self.progress: dict[int, Progress] = {}

    # ── start ──

    def launch(self) -> None:
        """Binds the endpoints and spawns torchrun.

        Raises:
            WorkerFailed: no ports, or the process cannot be started.
        """
        spec = self._spec
        endpoints = self._site.open()
        secret = secrets.token_hex(16)
        self._expected = Expected(spec.world_size, self._incarnation, secret)
        launch = launcher.plan(
            spec, endpoints, self._devices, self._site.path, self._incarnation, secret, self._environ
        )
        logger.debug("%s: %s", self._who, " ".join(launch.command))
        try:
            self._process = launcher.spawn(launch, self._environ)
        except OSError as error:
            raise WorkerFailed(f"{self._who}: cannot start {launch.command[0]}: {error}") from None
        self.agent_pid = self._process.pid
        assert self._process.stdout is not None
        self._site.read_agent(self._process.stdout.fileno())
        self._process.stdout.close()
        self._watches.append(Watch(self.agent_pid, self._agent_exited))

    async def connect(self, accept_timeout: float) -> None:
        """Accepts exactly N ranks.

        Raises:
            WorkerFailed: not all have come in time, or one has died before.
        """
        acceptor = Acceptor(self._site.listeners, self._expected, self._rank_arrived)
        try:
            arrivals = await self._unless_failed(acceptor.run(), accept_timeout)
        except TimeoutError:
            missing = ", ".join(map(str, acceptor.missing))
            text = f"{self._who}: rank {missing} did not connect within {accept_timeout:g} s"
            self.cause = Cause(What.SILENCE, acceptor.missing[0], 0, "did not connect", self._loop.time())
            raise WorkerFailed(text, self._last_lines(acceptor.missing)) from None
        for arrival in arrivals:
            link = Link(arrival.hello, self._received, self._room, self._lost)
            await self._loop.connect_accepted_socket(lambda link=link: link, arrival.socket)  # type: ignore[misc]
            self._arrivals.remove(arrival)
            self._links.append(link)
        self._site.outputs[AGENT].level = logging.DEBUG  # from here on torchrun only repeats what the ranks tell
        self._broadcast = Broadcast(
            *(self._loop, self._links, self._spec.limits, self._who, self._steps),
            *(self._on_free, self._broken, self._on_lost, self._on_event, self._meters),
        )

    async def load(self, timeout: float) -> None:
        """Sends LOAD to every rank and waits until each has answered, and has passed its probe if the handler offers one.

        Raises:
            WorkerFailed: a rank could not load, died, or took too long.
        """
        spec = self._spec
        options = spec.config.minserve
        message = Load(
            spec.name,
            spec.version,
            str(spec.model_dir),
            spec.handler,
            spec.config.batch_size,
            self._devices.mask is not None,
            options.reply_after == "all",
            spec.manifest,
            spec.envelope,
            spec.limit_max_image_pixels,
            spec.decode_input,
            predict_on=options.predict_on,
            metrics=spec.metrics,
            asynchronous=spec.asynchronous,
        )
        pieces = pack_with_body(Kind.LOAD, message, [spec.yaml], 0)
        for link in self._links:
            link.write(pieces)
        try:
            await self._unless_failed(self._load_and_probe(), timeout)
        except TimeoutError:
            await self._signs()  # for the log: where each rank is
            behind = [rank for rank in range(spec.world_size) if rank not in self._loaded]
            stages = [f"rank {rank} (pid {self.pids[rank]}): {self.stage(rank)}" for rank in behind]
            at = ", ".join(stages) or "all are loaded, not all are probed"
            text = f"{self._who}: not loaded within {spec.startup_timeout:g} s ({at})"
            first = behind[0] if behind else 0
            self.cause = Cause(What.SILENCE, first, self.pids[first], "did not load", self._loop.time())
            raise WorkerFailed(text, self._last_lines(behind)) from None
        assert self._broadcast is not None
        assert self._site.board is not None
        self._watchdog = Watchdog(
            *(self._loop, self._links, self._broadcast, spec.limits, self._site.board.read, self._verdict.suspect_hang),
            options.probe_interval if self._probes else 0.0,
        )

    async def _load_and_probe(self) -> None:
        await self._all_loaded.wait()
        if self._probes:
            assert self._broadcast is not None
            passed = asyncio.Event()
            self._broadcast.probe(passed.set)
            await passed.wait()

    @property
    def _probes(self) -> bool:
        return any(loaded.probes for loaded in self._loaded.values())

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

    def has_place(self) -> bool:
        """Whether a batch may be sent now."""
        return self._broadcast is not None and not self._verdict.pending and self._broadcast.has_place()

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
    def endpoints(self) -> Endpoints | None:
        """Where its ranks connect; None before the launch."""
        return self._site.endpoints

    @property
    def suspected(self) -> bool:
        """Whether something is wrong, whoever is to blame."""
        return self._verdict.pending

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
    def served(self) -> bool:
        """Whether it has carried a batch through."""
        return self._broadcast is not None and self._broadcast.batches_done > 0

    # ── end ──

    async def end(self, exit_timeout: float) -> None:
        """Ends every process: asks with SHUTDOWN if all ranks are well, waits `exit_timeout`, then kills."""
        self._verdict.close()
        if self._links and not self.failed.done():
            for link in self._links:
                link.write([pack(Kind.SHUTDOWN, Shutdown("the worker ends"))])
            await self._gone(exit_timeout, self._watches[1:] or self._watches)  # torchrun itself has nothing to finish
        await self.kill()

    async def kill(self) -> None:
        """Kills every process, answers what is in flight, leaves nothing behind. May be called at any time, also again."""
        if self._kill is None:
            self._kill = self._loop.create_task(self._kill_all())
        await asyncio.shield(self._kill)

    async def _kill_all(self) -> None:
        self._verdict.close()
        self._out_of_memory.close()
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._broadcast is not None:
            self._broadcast.fail_all(WorkerFailed(f"{self._who}: the worker was stopped"))
        if self.agent_pid:
            kill_tree(self.agent_pid, self.pids.values())
            await self._gone(GONE_S, self._watches)
            kill_leftovers(self._incarnation)
        for link in self._links:
            link.close()
        for arrival in self._arrivals:
            arrival.socket.close()
        for watch in self._watches:
            watch.close()
        self._site.close()

    async def _gone(self, timeout: float, watches: list[Watch]) -> None:
        try:
            async with asyncio.timeout(timeout):
                for watch in watches:
                    await watch.ended.wait()
        except TimeoutError:
            left = ", ".join(str(watch.pid) for watch in watches if not watch.ended.is_set())
            logger.warning("%s: still running after %g s: pid %s", self._who, timeout, left)

    # ── what the sockets, the board and the kernel tell ──

    def _steps(self, rank: int, seq: int) -> int:
        return self._site.board.read(rank).step_of(seq) if self._site.board is not None else 0

    def _rank_arrived(self, arrival: Arrival) -> None:
        rank, pid = arrival.hello.rank, arrival.hello.pid
        logger.debug("%s: rank %d (pid %d) connected", self._who, rank, pid)
        self.pids[rank] = pid
        self._arrivals.append(arrival)
        # A process without torchrun is its own agent, and watched as such already.
        if pid != self.agent_pid:
            self._watches.append(Watch(pid, lambda code: self._rank_exited(rank, pid, code)))

    def _received(self, link: Link, frame: Frame) -> None:
        if frame.kind is Kind.PROGRESS:
            self.progress[link.rank] = unpack(Progress, frame.meta)
            logger.info("%s rank %d: %s", self._who, link.rank, self.stage(link.rank))
        elif frame.kind is Kind.LOADED:
            self._loaded[link.rank] = unpack(Loaded, frame.meta)
            logger.debug("%s rank %d: loaded in %.1f s", self._who, link.rank, self._loaded[link.rank].seconds)
            if len(self._loaded) == self._spec.world_size:
                self._all_loaded.set()
        elif frame.kind is Kind.METRICS:
            self._meters.from_rank(link.rank, unpack(Metrics, frame.meta).metrics)
        elif frame.kind is Kind.FAILED:
            self._load_failed(link, unpack(Failure, frame.meta))
        elif not self._all_loaded.is_set() or self._broadcast is None:
            raise WireError(f"{frame.kind.name} before every rank has loaded")
        elif not self.failed.done():
            self._broadcast.received(link, frame)

    def _room(self) -> None:
        if self._broadcast is not None:
            self._broadcast.room_changed()

    def _lost(self, link: Link, reason: str | None) -> None:
        what = What.DEATH if reason is None else What.PROTOCOL
        detail = "closed its socket" if reason is None else f"broke the protocol: {reason}"
        cause = Cause(what, link.rank, link.pid, detail, self._loop.time())
        self._verdict.suspect(cause, final=reason is not None, gather=SOCKET_GATHER_S)

    def _rank_exited(self, rank: int, pid: int, code: int | None) -> None:
        cause = Cause(What.DEATH, rank, pid, describe_exit(code), self._loop.time(), code)
        # SIGKILL may be the agent's death signal, and then the agent's own end is a moment away.
        final = not cause.is_consequence and (rank == AGENT or code != -signal.SIGKILL)
        # A rank that has not come yet may have ended first, and only torchrun has seen it.
        unseen = rank != AGENT and len(self.pids) < self._spec.world_size
        gather = REPORT_GATHER_S if unseen else DEATH_GATHER_S
        self._verdict.suspect(cause, final=final, gather=gather)

    def _agent_exited(self, code: int | None) -> None:
        self._process.wait()  # it is a zombie now, so this does not block
        if len(self.pids) < self._spec.world_size and (first := self._site.first_failure()):
            self._rank_exited(first.rank, first.pid, first.code)
        self._rank_exited(AGENT if self._spec.config.is_parallel else 0, self.agent_pid, code)

    def _load_failed(self, link: Link, failure: Failure) -> None:
        text = f"{failure.type_name}: {failure.text} at {failure.place}"
        logger.error("%s rank %d cannot load: %s\n%s", self._who, link.rank, text, failure.traceback.rstrip())
        self._load_errors[link.rank] = text
        victim = failure.kind == "collective"
        what = What.COLLECTIVE if victim else What.EXCEPTION
        cause = Cause(what, link.rank, link.pid, f"cannot load: {failure.type_name}: {failure.text}", self._loop.time())
        grace = self._spec.config.minserve.error_grace if victim else 0.0
        self._verdict.suspect(cause, final=not victim, gather=grace)

    # ── the verdict ──

    def _broken(self, cause: Cause, seq: int) -> None:
        if cause.what in HANGS:
            self._verdict.suspect_hang(cause, seq)
        else:
            self._verdict.suspect(cause, final=True)

    def _exceptions(self) -> list[Cause]:
        return self._broadcast.causes if self._broadcast is not None else []

    async def _look_closer(self, noticed: Cause, seq: int) -> Cause:
        """Who hangs. Everything that is seen goes to the log."""
        suspects = set(range(self._spec.world_size)) - {cause.rank for cause in self._exceptions()}
        return hang.find(await self._signs(), sorted(suspects), seq, noticed)

    async def _signs(self) -> list[Signs]:
        """What can be seen of each rank that has come; logged."""
        seen = await look(self._site, self.pids, self._watchdog.silent if self._watchdog is not None else [])
        for one in seen:
            logger.error("%s: %s\n%s", self._who, one, one.stack.text.rstrip() if one.stack else "    no stack")
        return seen

    def _judged(self, cause: Cause) -> None:
        self.cause = cause
        kinds = {What.PROTOCOL: RankProtocolError, What.SILENCE: ResponseTimeout, What.STALL: ResponseTimeout}
        kind, hint = kinds.get(cause.what, WorkerFailed), ""
        if cause.exit_code == EXIT_OUT_OF_MEMORY:
            kind = WorkerOutOfMemory
        elif cause.exit_code == -signal.SIGKILL and self._out_of_memory.lately():
            kind, hint = WorkerOutOfMemory, ": the kernel's out-of-memory killer was at work"
        error = kind(
            f"{self._who}: {cause}{hint}", self._last_lines([cause.rank]), self._load_errors.get(cause.rank, "")
        )
        self.failed.set_result(error)
        if self._broadcast is not None:
            self._broadcast.fail_all(error)

    def stage(self, rank: int) -> str:
        """How far a rank's load is, in words."""
        if rank in self._loaded:
            return "loaded"
        progress = self.progress.get(rank)
        if progress is None:
            return "importing"
        return f"{progress.stage} {progress.done} of {progress.total}" if progress.total else progress.stage

    def _last_lines(self, ranks: list[int]) -> tuple[str, ...]:
        """The last lines that the ranks printed; torchrun's, too, where one has not come as far as its own pipe."""
        silent = any(rank not in self.pids for rank in ranks)
        sources = dict.fromkeys([*ranks, AGENT] if silent else ranks)
        return self._site.last_lines(sources)
