"""A run from its start to its end: the faults under load, then the end of the server itself, with an audit after each."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from tests.chaos.audit import audit, settled
from tests.chaos.catalogue import Model
from tests.chaos.client import GONE, Client
from tests.chaos.faults import Moment
from tests.chaos.ledger import Ledger
from tests.chaos.others import Other
from tests.chaos.scene import LOAD_CLIENTS, READY_S, NotReadyError, Scene
from tests.chaos.schedule import Injection, lanes
from tests.chaos.server import ChaosServer
from tests.chaos.strike import Strike

START_S = 120.0
FAMILY_GONE_S = 2.0
STOP_S = 20.0
KILLS = UNDER_LOAD, IDLE, LOADING = ("under load", "idle", "while a worker loads")
ANYTHING = re.compile("")


@dataclass(frozen=True)
class Options:
    """How a run is to be.

    Attributes:
        restarts_at_once: workers that may be starting at one time.
        server_kills: how often the server itself is killed: under load, idle, while a worker loads, and so on.
        tolerance_s: what is later than its limit by more than this is a breach.
        until: on CLOCK_MONOTONIC, when no further fault is begun.
    """

    seed: int
    models: tuple[Model, ...]
    injections: list[Injection]
    restarts_at_once: int = 2
    server_kills: int = 2
    tolerance_s: float = 0.0
    until: float = float("inf")
    tell: Callable[[str], None] = field(default=print)


async def run(options: Options) -> Ledger:
    """The whole run; all that it found is in the ledger."""
    ledger, server = Ledger(), ChaosServer(options.models)
    rng = random.Random(options.seed + 1)
    try:
        async with Client(server, ledger, rng, 0.5 + options.tolerance_s) as client:
            scene = Scene(server, client, ledger, rng, options.tolerance_s)
            server.start()
            await _all_ready(scene, START_S)
            await client.call_again()
            baseline = await settled(scene)
            options.tell(f"{len(options.models)} models are READY; the server has {baseline}")
            async with _load(scene):
                await _faults(scene, options)
            await _settle(scene)
            await client.call_again()
            options.tell(f"through with the faults; the server has {await audit(scene, baseline)}")
            await _end_of_the_server(scene, options)
            return ledger
    finally:
        server.clean_up()


# ── faults of workers, clients and operators ──


async def _faults(scene: Scene, options: Options) -> None:
    starts = asyncio.Semaphore(options.restarts_at_once)
    done = 0

    async def lane(injections: list[Injection]) -> None:
        nonlocal done
        for injection in injections:
            if time.monotonic() > options.until:
                return
            other = injection.fault.moment in (Moment.CLIENT, Moment.OPERATOR)
            what: Other | Strike = (Other if other else Strike)(scene, injection)
            try:
                if injection.fault.restarting or injection.fault.moment is Moment.OPERATOR:
                    async with starts:
                        await what.run()
                else:
                    await what.run()
            except NotReadyError as error:
                what.breach(str(error))
            except Exception as error:  # the run goes on: one fault must not hide what the others would show
                what.breach(f"{type(error).__name__}: {error}")
            await asyncio.sleep(scene.rng.uniform(0.1, 0.4))  # right answers under load belong to a run, too
            done += 1
            if not done % 10:
                found = len(scene.ledger.breaches)
                options.tell(f"{done}/{len(options.injections)} faults, {found} breaches")

    await asyncio.gather(*(lane(injections) for injections in lanes(options.injections).values()))


@asynccontextmanager
async def _load(scene: Scene) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(scene.load(model)) for model in scene.server.models for _ in range(LOAD_CLIENTS)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(end, asyncio.CancelledError):
                scene.ledger.breach("load", "", f"a client of the background load has ended: {end!r}")


async def _all_ready(scene: Scene, timeout: float) -> None:
    server, deadline = scene.server, time.monotonic() + timeout
    for model in server.models:
        while await scene.watch(model, lambda facts: facts.serving, 1.0) is None:
            if server.exit_code is not None or time.monotonic() > deadline:
                raise NotReadyError(f"{model.name} is not READY within {timeout:g} s:\n{server.log_since(0)[-5000:]}")
        await scene.healthy(model)


async def _settle(scene: Scene) -> None:
    for model in scene.server.models:
        if await scene.watch(model, lambda facts: facts.state == "READY" and not facts.pending, READY_S) is None:
            scene.ledger.breach("audit", model.name, f"not READY again at the end: {await scene.facts(model)}")


# ── the end of the server ──


async def _end_of_the_server(scene: Scene, options: Options) -> None:
    kinds = itertools.cycle(KILLS)
    for number in range(1, options.server_kills + 1):
        await _kill_the_server(scene, next(kinds))
        options.tell(f"the server was killed and is up again ({number}/{options.server_kills})")
    await _stop_the_server(scene)


async def _kill_the_server(scene: Scene, when: str) -> None:
    """SIGKILL, and a new server on the same store and ports at once; what the old one had started is gone within 2 s."""
    server, ledger = scene.server, scene.ledger
    row = ledger.row(f"SIGKILL of the server ({when})")
    row.count, row.restarts, row.limits = row.count + 1, 1, {FAMILY_GONE_S}
    async with AsyncExitStack() as stack:
        for model in server.models:  # from here on connections may break: the other end is gone
            stack.enter_context(ledger.window(model.name, row, frozenset({GONE, 503}), ANYTHING, breaks_streams=True))
        if when == UNDER_LOAD:
            await stack.enter_async_context(_load(scene))
            await asyncio.sleep(0.5)
        elif when == LOADING:
            model = server.models[-1]
            os.kill((await scene.facts(model)).ranks[0], signal.SIGKILL)
            await scene.watch(model, lambda facts: facts.state in ("CONNECTING", "LOADING"), READY_S)
        at, killed = time.monotonic(), server.generation
        server.kill()
        server.start()
        left = await asyncio.to_thread(server.wait_until_alone, FAMILY_GONE_S + scene.tolerance_s, killed)
        row.detected.append(time.monotonic() - at)
        row.over += row.detected[-1] > FAMILY_GONE_S
        if left:
            ledger.breach(row.name, "", f"still there: {[(one.pid, one.cmdline()[-3:]) for one in left]}")
        await _all_ready(scene, START_S)
        row.recovered.append(time.monotonic() - at)


async def _stop_the_server(scene: Scene) -> None:
    """SIGTERM under load: what is in flight is answered, nothing is left, and it ends in 0."""
    server, ledger = scene.server, scene.ledger
    row = ledger.row("SIGTERM of the server under load")
    row.count += 1
    async with AsyncExitStack() as stack:
        for model in server.models:
            stack.enter_context(ledger.window(model.name, row, frozenset({GONE, 503}), ANYTHING, breaks_streams=True))
        asked = [asyncio.ensure_future(scene.client.ask(model, {"work": 0.5}, row=row)) for model in server.models]
        await stack.enter_async_context(_load(scene))
        await asyncio.sleep(0.3)
        server.processes()
        at = time.monotonic()
        server.terminate()
        await scene.until(lambda: server.exit_code is not None, STOP_S + scene.tolerance_s, "the end of the server")
        row.recovered.append(time.monotonic() - at)
        for model, one in zip(server.models, asked, strict=True):
            result = await one
            if result.status == GONE:
                ledger.breach(row.name, model.name, f"a request in flight had no answer: {result.message}")
    if server.exit_code:
        ledger.breach(row.name, "", f"it ended with {server.exit_code}:\n{server.log_since(0)[-2000:]}")
    left = await asyncio.to_thread(server.wait_until_alone, FAMILY_GONE_S)
    if left:
        ledger.breach(row.name, "", f"still there: {[(one.pid, one.cmdline()[-3:]) for one in left]}")
    if files := server.files():
        ledger.breach(row.name, "", f"files left: {files}")
