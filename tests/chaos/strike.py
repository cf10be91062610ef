"""Does a fault to a rank, and sees what comes of it: when it is noticed, by what name, and when answers are right again."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from datetime import datetime

import psutil

from tests.chaos.client import Json, Result
from tests.chaos.faults import BY, VAGUE, Limit, Moment, Who
from tests.chaos.ledger import Window
from tests.chaos.scene import READY_S, Facts, Scene, due, fill, longest_wait
from tests.chaos.schedule import Injection

LEAD_S = 0.3  # from sending a request to the moment of its fault: it is in its batch by then
STEP = 4  # of a stream, at which it is hit
WORK_S = 1.5  # of a batch that is hit from outside
PAUSE_S = 0.7  # between SIGSTOP and SIGCONT
NO_FAULTS = ("ready", "restart", "stream-cancelled")  # events of other kinds than a fault's own
IN_STEP_RECOVERS_S = 3.0  # when nothing is restarted the next answer is a matter of moments


class Strike:
    """One fault that is done to a rank, by its own hand or by a signal."""

    def __init__(self, scene: Scene, injection: Injection) -> None:
        self.scene = scene
        self.injection = injection
        self.fault, self.model = injection.fault, injection.model
        self.row = scene.ledger.row(injection.title)
        self.row.count += 1
        self.row.restarts += self.fault.restarts
        self.limit = scene.limit(self.fault, self.model)
        if self.limit is not None:
            self.row.limits.add(self.limit)

    async def run(self) -> None:
        """From a healthy worker to a healthy worker."""
        before = await self.scene.healthy(self.model)
        agent = psutil.Process(before.agent)
        old = [agent, *agent.children(recursive=True)]
        offset, began = self.scene.server.log_size, time.time()
        strikes: dict[Moment, Callable[[Facts], Awaitable[None]]] = {
            Moment.BATCH: self._by_request,
            Moment.STREAM: self._by_request,
            Moment.SIGNAL_BATCH: self._by_signal,
            Moment.SIGNAL_STREAM: self._by_signal,
            Moment.SIGNAL_IDLE: self._when_idle,
            Moment.LOADING: self._while_loading,
        }
        await strikes[self.fault.moment](before)
        await self._look_at_the_worker(before, old)
        self._look_at_the_log(offset)
        if self.fault.limit is not Limit.NONE:
            await self._look_at_the_events(began)

    def breach(self, text: str) -> None:
        """Books something that must not happen."""
        self.scene.ledger.breach(self.injection.title, self.model.name, f"{self.injection}: {text}")

    # ── four ways to strike ──

    async def _by_request(self, before: Facts) -> None:
        """A request tells the ranks, and is hit itself."""
        fault = self.fault
        at = time.monotonic() + LEAD_S
        order: Json = {"do": fault.do, "ranks": self._ranks(), "moment": "before", "at": at, **fault.order}
        fields: Json = {"fault": order}
        if fault.moment is Moment.STREAM:
            order |= {"moment": "step", "step": STEP}
            fields |= {"steps": 2 * STEP}
        with self._window(before):
            await self._was_hit(before, await self.scene.client.ask(self.model, fields, row=self.row), at)

    async def _by_signal(self, before: Facts) -> None:
        """A request is at work when a signal comes from outside."""
        fields: Json = {"steps": 100, "pace": WORK_S / 100} if self.model.streams else {"work": WORK_S}
        with self._window(before):
            asked = asyncio.ensure_future(self.scene.client.ask(self.model, fields, row=self.row))
            await asyncio.sleep(LEAD_S)
            at = time.monotonic()
            if self.fault.do == "SIGCONT":
                self._signal(before, "SIGSTOP")
                await asyncio.sleep(PAUSE_S)
            self._signal(before, self.fault.do)
            await self._was_hit(before, await asked, at)

    async def _when_idle(self, before: Facts) -> None:
        """A signal while nothing is under way: seen by whoever looks at the model's state."""
        with self._window(before):
            async with self.scene.without_load(self.model):
                at = time.monotonic()
                self._signal(before, self.fault.do)
                await self._is_seen(before, at)
                await self._look_at_health()
            await self._recovers(at)

    async def _while_loading(self, before: Facts) -> None:
        """The worker is killed, and its next start meets the fault."""
        order = self.scene.server.control / f"{self.model.name}.json"
        hit = order.with_suffix(".hit")
        order.write_text(json.dumps({"do": self.fault.do, "rank": self.injection.rank, **self.fault.order}))
        killed = fill(f"{BY}.*(SIGKILL|{VAGUE})", self.model, "rank 0", 0, before.ranks[0])
        with self._window(before, killed):
            os.kill(before.ranks[0], signal.SIGKILL)
            await self.scene.until(hit.exists, READY_S, "the start that is to be hit")
            struck = json.loads(hit.read_text())
            hit.unlink()
            if self.fault.limit is not Limit.NONE:
                who = "agent" if self.fault.who is Who.AGENT else "pid"
                await self._start_failed(before, killed, struck["at"], struck[who])
            await self._recovers(struck["at"])

    async def _start_failed(self, before: Facts, killed: re.Pattern[str], at: float, pid: int) -> None:
        """Operators see why the start has failed: in place of why the worker had to be started."""
        said = due(self.fault, self.model, self.injection.rank, pid)

        def told(facts: Facts) -> bool:
            return said.search(facts.error) is not None and killed.search(facts.error) is None

        def over(facts: Facts) -> bool:
            return told(facts) or (facts.serving and facts.restarts > before.restarts + 1)

        seen = await self.scene.watch(self.model, over, longest_wait(self.injection))
        if seen is None or not told(seen):
            error = seen.error if seen is not None else (await self.scene.facts(self.model)).error
            self.breach(f"/models/{self.model.name} does not say /{said.pattern}/ but {error!r}")
            return
        self._detected(time.monotonic() - at)
        self._count_vague(seen.error)
        if self.fault.who is not Who.AGENT and not any("chaos: rank" in line for line in seen.lines):
            self.breach(f"the rank's last lines are not there, but {seen.lines}")

    # ── what comes of it ──

    async def _was_hit(self, before: Facts, result: Result, at: float) -> None:
        """The request that was under way when it happened has its answer."""
        if (result.status == 200) != self.fault.spares:
            self.breach(f"the request that it hit got {result.status} {result.message!r}")
        if not self.fault.spares:
            self._detected(result.got - at)
        elif self.fault.limit is not Limit.NONE and not self.model.retries:  # one that is retried is answered later
            await self._is_seen(before, at)
        if self.fault.restarting:
            await self._look_at_health()
        await self._recovers(at)

    async def _is_seen(self, before: Facts, at: float) -> None:
        """Operators see it, where no request has told."""
        if await self.scene.watch(self.model, before.differ, longest_wait(self.injection)) is None:
            self.breach("was never seen")
        else:
            self._detected(time.monotonic() - at)

    async def _recovers(self, at: float) -> None:
        result = await self.scene.client.ask(self.model, row=self.row)
        if result.status == 200:
            self.row.recovered.append(result.got - at)
        if self.fault.limit is Limit.NONE or self.fault.restarting:
            return
        if result.got - at > IN_STEP_RECOVERS_S + self.scene.tolerance_s:
            self.breach(f"the next answer came only after {result.got - at:.2f} s")

    def _detected(self, seconds: float) -> None:
        self.row.detected.append(seconds)
        if self.limit is not None and seconds > self.limit:
            self.row.over += 1
            if seconds > self.limit + self.scene.tolerance_s:
                self.breach(f"detected after {seconds:.3f} s, the limit is {self.limit:g} s")

    def _count_vague(self, error: str) -> None:
        self.row.vague += VAGUE in self.fault.says and re.search(VAGUE, error) is not None

    async def _look_at_health(self) -> None:
        """/readyz must not say 200 while the only worker is down."""
        down = not (await self.scene.facts(self.model)).serving
        status, text = await self.scene.client.ready()
        if status not in (200, 503):
            self.breach(f"/readyz says {status}")
        elif down and status == 200 and not (await self.scene.facts(self.model)).serving:
            self.breach(f"/readyz says {status} while the worker is down")
        elif status == 503 and not text:
            self.breach("/readyz gives no reason")

    async def _look_at_the_worker(self, before: Facts, old: Iterable[psutil.Process]) -> None:
        after = await self.scene.watch(self.model, lambda facts: facts.serving, READY_S)
        if after is None:
            self.breach("is not READY again")
            return
        if after.restarts != before.restarts + self.fault.restarts:
            cost = after.restarts - before.restarts
            self.breach(f"cost {cost} restarts, {self.fault.restarts} were due; lastError: {after.error!r}")
        if not self.fault.restarting:
            return
        if self.fault.moment is not Moment.LOADING:
            said = due(self.fault, self.model, self.injection.rank, self._pid(before))
            if not said.search(after.error):
                self.breach(f"lastError does not say /{said.pattern}/ but {after.error!r}")
            self._count_vague(after.error)
        deadline = time.monotonic() + 2.0 + self.scene.tolerance_s
        while left := [process.pid for process in old if process.is_running()]:
            if time.monotonic() > deadline:
                self.breach(f"of the failed worker these still run: {left}")
                return
            await asyncio.sleep(0.02)

    def _look_at_the_log(self, offset: int) -> None:
        """Behind a hang there is the Python stack of every rank that was able to tell it."""
        if self.fault.limit not in (Limit.STALL, Limit.RESPONSE):
            return
        log = self.scene.server.log_since(offset)
        for rank in range(self.model.ranks):
            silent = self.fault.do == "SIGSTOP" and rank == self.injection.rank
            stack = re.search(rf"{re.escape(self.model.name)}/\d: rank {rank} \(pid .*\n.*most recent call first", log)
            if not silent and stack is None:
                self.breach(f"no Python stack of rank {rank} in the log")

    async def _look_at_the_events(self, began: float) -> None:
        events = [event for event in await self.scene.client.events(self.model) if when(event) >= began - 0.01]
        faults = [event for event in events if event["kind"] not in NO_FAULTS]
        if len(faults) != max(1, self.fault.restarts):
            self.breach(f"left {len(faults)} events: {events}")
            return
        lacking = {"model", "worker", "rank", "kind", "detail"} - set().union(*events)
        if lacking:
            self.breach(f"its events lack {sorted(lacking)}: {events}")
        rank = self.injection.rank  # that ranks did not connect, or not load, is an event about all of them
        named = any(event["rank"] == rank or f"rank {rank} " in str(event["detail"]) for event in faults)
        if self.fault.restarting and self.fault.who in (Who.ONE, Who.NOT_ZERO) and not named:
            self.breach(f"no event names rank {self.injection.rank}: {events}")

    # ── small things ──

    def _window(self, before: Facts, says: re.Pattern[str] | None = None) -> AbstractContextManager[Window]:
        says = says or due(self.fault, self.model, self.injection.rank, self._pid(before))
        breaks = self.model.streams and (self.fault.limit is not Limit.NONE or self.fault.restarting)
        statuses = frozenset({503}) if self.fault.moment is Moment.LOADING else self.fault.statuses
        return self.scene.ledger.window(
            self.model.name, self.row, statuses, says, breaks_streams=breaks, come_again=self.fault.restarting
        )

    def _pid(self, before: Facts) -> int:
        return before.agent if self.fault.who is Who.AGENT else before.ranks[self.injection.rank]

    def _ranks(self) -> list[int]:
        return list(range(self.model.ranks)) if self.fault.who is Who.ALL else [self.injection.rank]

    def _signal(self, before: Facts, name: str) -> None:
        os.kill(self._pid(before), signal.Signals[name])


def when(event: Json) -> float:
    """The time of an event, in seconds since the epoch, whether it is told as a number or as text."""
    told = event.get("time", event.get("at", 0.0))
    if isinstance(told, int | float):
        return float(told)
    return datetime.fromisoformat(str(told)).timestamp()
