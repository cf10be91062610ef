"""What clients and operators do: it costs no restart, and nobody else's request."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from contextlib import suppress

import psutil

from tests.chaos.catalogue import STREAM_STALL_S
from tests.chaos.client import Json
from tests.chaos.scene import Facts, Scene
from tests.chaos.schedule import Injection

WORK_S = 0.6
OWN_DEADLINE_S = 0.2
FREE_S = 2.0  # the next good answer, behind a client that has left
STORM = 150
LONG_STREAM: Json = {"steps": 2000, "pace": 0.005}  # ten seconds, if nothing stops it
UNREAD: Json = {"steps": 600, "pad": 100_000}  # 60 MB
UNREAD_RSS = 8 * 2**20  # the server may grow by so much meanwhile
SCALED_S = 15.0
RELOADED_S = 60.0


class Other:
    """One such thing."""

    def __init__(self, scene: Scene, injection: Injection) -> None:
        self.scene = scene
        self.injection = injection
        self.fault, self.model = injection.fault, injection.model
        self.row = scene.ledger.row(injection.title)
        self.row.count += 1

    async def run(self) -> None:
        """Does it, and sees that the worker is none the worse."""
        before = await self.scene.healthy(self.model)
        what = {
            "leave_the_queue": self._leave_the_queue,
            "leave_in_flight": self._leave_in_flight,
            "deadline_in_flight": self._deadline_in_flight,
            "deadline_in_the_queue": self._deadline_in_the_queue,
            "storm": self._storm,
            "leave_the_stream": lambda: self._leave_the_stream(LONG_STREAM),
            "leave_a_stream_of_a_thread": lambda: self._leave_the_stream({**LONG_STREAM, "how": "thread"}),
            "leave_a_stream_of_rank_0": lambda: self._leave_the_stream({"steps": 100, "pace": 0.01, "how": "rank0"}),
            "read_slowly": self._read_slowly,
            "read_nothing": self._read_nothing,
            "stream_of_rank_0": lambda: self._stream("rank0"),
            "stream_of_a_thread": lambda: self._stream("thread"),
            "reload": lambda: self._reload(before),
            "scale": self._scale,
        }[self.fault.do]
        says = re.compile(self.fault.says, re.DOTALL)
        with self.scene.ledger.window(self.model.name, self.row, self.fault.statuses, says):
            await what()
            result = await self.scene.client.ask(self.model, row=self.row)
            if result.status != 200:
                self.breach(f"the next request got {result.status} {result.message!r}")
        after = await self.scene.facts(self.model)
        other_ranks = self.fault.do in ("reload", "scale")
        if not other_ranks and (after.restarts, after.ranks) != (before.restarts, before.ranks):
            self.breach(f"the worker was restarted: {after.error!r}")

    def breach(self, text: str) -> None:
        """Books something that must not happen."""
        self.scene.ledger.breach(self.injection.title, self.model.name, f"{self.injection}: {text}")

    # ── clients that leave ──

    async def _leaves(self, fields: Mapping[str, object], after_s: float) -> None:
        """A client that sends a request and goes."""
        asked = asyncio.ensure_future(self.scene.client.ask(self.model, fields, row=self.row))
        await asyncio.sleep(after_s)
        asked.cancel()
        with suppress(asyncio.CancelledError):
            await asked

    async def _next_within(self, seconds: float) -> None:
        """A good answer must come so soon from now on."""
        at = time.monotonic()
        result = await self.scene.client.ask(self.model, row=self.row)
        if result.status == 200:
            self.row.recovered.append(result.got - at)
        if result.got - at > seconds + self.scene.tolerance_s:
            self.breach(f"the next answer came after {result.got - at:.2f} s, {seconds:g} s were due")

    async def _leave_the_queue(self) -> None:
        """It must be gone from the queue while the worker is still busy with another."""
        async with self.scene.without_load(self.model):
            busy = [
                asyncio.ensure_future(self.scene.client.ask(self.model, {"work": 2 * WORK_S}, row=self.row))
                for _ in range(2)
            ]
            await asyncio.sleep(WORK_S / 2)
            leaves = asyncio.ensure_future(self._leaves({}, WORK_S / 4))
            await asyncio.sleep(WORK_S / 8)
            waiting = (await self.scene.facts(self.model)).pending
            await leaves
            at = time.monotonic()
            gone = await self.scene.watch(self.model, lambda facts: facts.pending < waiting, WORK_S)
            if waiting and gone is None:
                self.breach("a client that has left is still in the queue")
            elif waiting:
                self.row.detected.append(time.monotonic() - at)
            await asyncio.gather(*busy)

    async def _leave_in_flight(self) -> None:
        await self._leaves({"work": WORK_S}, WORK_S / 2)
        await self._next_within(WORK_S + FREE_S)

    async def _leave_the_stream(self, fields: Mapping[str, object]) -> None:
        """The ranks must be free long before the stream would have ended, or, where they cannot be stopped, at its end."""
        async with self.scene.without_load(self.model):  # one that shares its batch would rightly keep it going
            await self._leaves(fields, 0.4)
            await self._next_within(FREE_S)

    async def _storm(self) -> None:
        """Many clients that leave or whose deadline is short, and then one that must be answered at once."""
        rng = self.scene.rng

        async def one() -> None:
            if rng.random() < 0.5:
                await self._leaves({"work": 0.02}, rng.uniform(0.0, 0.2))
            else:
                await self.scene.client.ask(self.model, {"work": 0.02}, rng.uniform(0.02, 0.2), row=self.row)

        await asyncio.gather(*(one() for _ in range(STORM)))
        await self._next_within(FREE_S)

    # ── deadlines ──

    async def _deadline_in_flight(self) -> None:
        """It is answered at its deadline; its place is free when the ranks are through."""
        await self._expires({"work": WORK_S})
        await self._next_within(WORK_S + FREE_S)

    async def _deadline_in_the_queue(self) -> None:
        busy = asyncio.ensure_future(self.scene.client.ask(self.model, {"work": 2 * WORK_S}, row=self.row))
        await asyncio.sleep(WORK_S / 4)
        await self._expires({})
        await busy

    async def _expires(self, fields: Mapping[str, object]) -> None:
        result = await self.scene.client.ask(self.model, fields, OWN_DEADLINE_S, row=self.row)
        late = result.got - result.sent - OWN_DEADLINE_S
        if result.status != 504:
            self.breach(f"got {result.status} {result.message!r} {late:+.2f} s from its deadline")
        else:
            self.row.detected.append(max(0.0, late))

    # ── streams ──

    async def _stream(self, how: str) -> None:
        await self.scene.client.ask(self.model, {"steps": 20, "how": how}, row=self.row)

    async def _read_slowly(self) -> None:
        """3 MB, 64 kB at a time: all of it must come, and it must be right."""
        fields: Json = {"steps": 60, "pad": 50_000}
        read = await self.scene.client.read(self.model, fields, pause_s=0.05, row=self.row)
        if not read.whole:
            self.breach(f"a slow reader got {read.lines} of {fields['steps']} lines")

    async def _read_nothing(self) -> None:
        """The ranks must wait, the server must not fill up, and the client must count as gone after streamStallTimeout."""
        process = psutil.Process(self.scene.server.pid)
        before = process.memory_info().rss
        async with self.scene.without_load(self.model):
            reader = asyncio.ensure_future(
                self.scene.client.read(self.model, UNREAD, pause_s=STREAM_STALL_S + 2.0, most=1, row=self.row)
            )
            await asyncio.sleep(STREAM_STALL_S / 2)
            grown = process.memory_info().rss - before
            if grown > UNREAD_RSS:
                self.breach(f"the server grew by {grown / 2**20:.0f} MB while a client read nothing")
            await self._next_within(STREAM_STALL_S + FREE_S)
            await reader

    # ── operators ──

    async def _reload(self, before: Facts) -> None:
        """The background load goes on, and not one of its requests may fail."""
        at = time.monotonic()
        status, text = await self.scene.client.reload(self.model)
        if status not in (200, 202):
            self.breach(f"POST /models/{self.model.name}/reload says {status}: {text[:200]}")
            return
        after = await self.scene.watch(
            self.model, lambda facts: facts.serving and not set(facts.ranks) & set(before.ranks), RELOADED_S
        )
        if after is None:
            self.breach(f"no other ranks are READY {RELOADED_S:g} s after a reload")
        else:
            self.row.recovered.append(time.monotonic() - at)

    async def _scale(self) -> None:
        """Requests that wait bring a second worker, idleness takes it away again."""
        async with self.scene.without_load(self.model):
            asked = [
                asyncio.ensure_future(self.scene.client.ask(self.model, {"work": 0.5}, row=self.row)) for _ in range(8)
            ]
            at = time.monotonic()
            if await self.scene.watch(self.model, lambda facts: facts.workers == 2, SCALED_S) is None:
                self.breach("no second worker came though requests waited")
            else:
                self.row.detected.append(time.monotonic() - at)
            await asyncio.gather(*asked)
            if await self.scene.watch(self.model, lambda facts: facts.workers == 1, SCALED_S) is None:
                self.breach("the second worker stayed though nothing was to do")
