"""One life of a server after the other: start to READY, memory, idle CPU, and the way back after a rank's SIGKILL."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import psutil

from tests.benchmarks.contest import OURS, LoadError, cpu_seconds
from tests.benchmarks.peers.gloo import torchrun
from tests.benchmarks.peers.torchserve import TORCHSERVE
from tests.benchmarks.plot import Panel
from tests.benchmarks.programs import START_TIMEOUT_S, Program, ProgramError, family_of
from tests.benchmarks.report import Aim, Findings, absolute, compare
from tests.benchmarks.servers import ask
from tests.benchmarks.workspace import HANDLERS, Model

if TYPE_CHECKING:
    from tests.benchmarks.report import Row
    from tests.benchmarks.run import Run
    from tests.benchmarks.servers import Up

SCENARIO = "life, 2 ranks, all-reduce"
SCRIPT = HANDLERS / "all_reduce.py"
MODEL = Model("sum", (SCRIPT,))
LOAD = b'"load"'  # the handler's answer: how long its `initialize` took
TORCHRUN = "torchrun"
MEGABYTE = 1e6
LOAD_S = 1
RETRY_S = 0.005
Samples = dict[str, list[float]]


class Lives:
    """What every life of each server has shown, by the server's name."""

    def __init__(self) -> None:
        self.start: Samples = defaultdict(list)
        self.recovery: Samples = defaultdict(list)
        self.own_recovery: Samples = defaultdict(list)
        self.memory: Samples = defaultdict(list)
        self.server_memory: Samples = defaultdict(list)
        self.idle: Samples = defaultdict(list)


def measure(run: Run) -> Findings:
    """All in turns, each ended before the other starts: they would share the cores."""
    lives = Lives()
    for number in range(1, run.plan.starts + 1):
        for name in (OURS, TORCHSERVE):
            _live(run, lives, name)
        lives.start[TORCHRUN].append(_time_torchrun(run))
        seen = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in lives.start.items())
        back = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in lives.recovery.items())
        run.plan.tell(f"life {number} of {run.plan.starts}: start: {seen}; recovery: {back}")
    panels = [
        Panel.of("start to READY, 2 ranks", "s", {name: lives.start[name] for name in (OURS, TORCHSERVE, TORCHRUN)}),
        Panel.of("rank's SIGKILL to the next answer", "s", {name: lives.recovery[name] for name in (OURS, TORCHSERVE)}),
    ]
    return Findings(_rows(lives), panels)


def _live(run: Run, lives: Lives, name: str) -> None:
    """One life, noted down if it was lived to its end."""
    with run.forgive(name):
        with run.server(name, [MODEL]) as up:
            start = time.perf_counter() - up.program.began
            run.clients(up, MODEL.name, clients=16).turn(LOAD_S)
            memory = [one.memory_full_info().pss for one in (psutil.Process(up.pid), *family_of(up.pid))]
            server_memory = psutil.Process(up.pid).memory_info().rss
            idle = _idle_percent(run, up)
            recovery, load = _recover(up)
        lives.start[name].append(start)
        lives.memory[name].append(sum(memory) / MEGABYTE)
        lives.server_memory[name].append(server_memory / MEGABYTE)
        lives.idle[name].append(idle)
        lives.recovery[name].append(recovery)
        lives.own_recovery[name].append(recovery - load)


def _idle_percent(run: Run, up: Up) -> float:
    """CPU of the server's own process while nobody asks anything."""
    run.plan.tell(f"watching the idle {up.name} for {run.plan.idle_s:g} s")
    before, began = cpu_seconds([up.pid]), time.perf_counter()
    time.sleep(run.plan.idle_s)  # the measurement itself
    return 100 * (cpu_seconds([up.pid]) - before) / (time.perf_counter() - began)


def _recover(up: Up) -> tuple[float, float]:
    """Kills rank 1 and asks until an answer is good: the seconds until then, and those of the handler's `initialize`.

    Raises:
        ProgramError: there was none in time.
    """
    os.kill(_rank_1(up), signal.SIGKILL)
    began = time.perf_counter()
    while time.perf_counter() < began + START_TIMEOUT_S:
        try:
            status, answer = ask(up.url(MODEL.name), LOAD)
        except LoadError:
            continue
        if status == 200:
            return time.perf_counter() - began, float(answer)
        time.sleep(RETRY_S)  # a client's own pace
    raise ProgramError("no good answer after a rank's SIGKILL")


def _rank_1(up: Up) -> int:
    if up.name == OURS:
        return up.ranks(MODEL.name)[1]
    # Of another server the environment tells; torchrun itself has none of it.
    return next(one.pid for one in family_of(up.pid) if one.environ().get("RANK") == "1")


def _time_torchrun(run: Run) -> float:
    with Program(run.workspace, TORCHRUN, torchrun(SCRIPT, run.workspace.new_folder("torchrun"))) as program:
        program.wait_for("^reduced$")
        return time.perf_counter() - program.began


def _rows(lives: Lives) -> list[Row]:
    def row(what: str, unit: str, samples: Samples, other: str, aim: Aim | None = None, headline: bool = False) -> Row:
        whole = len(samples[other]) == len(samples[OURS])  # it has not failed in any of its lives
        return compare(SCENARIO, what, unit, samples[OURS], other, samples[other] if whole else [], aim, headline)

    killed = "rank's SIGKILL to the next good answer"
    return [
        row("start to READY", "s", lives.start, TORCHSERVE, headline=True),
        row("start to READY", "s", lives.start, TORCHRUN, Aim("≤", 1.3)),
        row(killed, "s", lives.recovery, TORCHSERVE, headline=True),
        absolute(SCENARIO, f"{killed}, less the handler's initialize", "s", lives.own_recovery[OURS],
                 Aim("≤", 1.0, " s")),
        row("memory of all processes (PSS)", "MB", lives.memory, TORCHSERVE),
        row("memory of the server's process (RSS)", "MB", lives.server_memory, TORCHSERVE),
        absolute(SCENARIO, "memory of the server's process (RSS)", "MB", lives.server_memory[OURS], Aim("≤", 80, " MB")),
        absolute(SCENARIO, "server's CPU when idle", "%", lives.idle[OURS], Aim("<", 1, " %")),
    ]  # fmt: skip
