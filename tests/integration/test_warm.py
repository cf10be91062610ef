"""The warm launcher against plain torchrun: what it forks is the same, and whoever dies, nothing is left and all goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.servers import GONE_S, MODELS, RunningServer, gone, server, until

ALONE = "parallelType: ''\nmaxBatchDelay: 0\n"


def copy(folder: Path, name: str, launcher: str, config: str = "") -> Path:
    """The model that tells of its process, under another name, with a module of its own that the others have, too."""
    model = folder / name
    shutil.copytree(MODELS / "facts", model)
    config = config or (model / "model-config.yaml").read_text()
    (model / "model-config.yaml").write_text(f"{config}minserve: {{launcher: {launcher}, backoff: [0]}}\n")
    (model / "helper.py").write_text(f"NAME = {name!r}\n")
    return model


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("models")
    models = [copy(folder, f"ranks-{launcher}", launcher) for launcher in ("warm", "torchrun")]
    models += [copy(folder, f"alone-{launcher}", launcher, ALONE) for launcher in ("warm", "torchrun")]
    with server(*models, options=("--log-level", "debug")) as started:
        yield started


def ask(running: RunningServer, model: str, what: str) -> list[object]:
    answer = running.predict(model, what)
    assert answer.status == 200, answer.message
    ranks = answer.json
    assert isinstance(ranks, list)
    return ranks


def launcher_pid(running: RunningServer) -> int:
    """Of the launcher that was started last."""
    return int(re.findall(r"warm launcher: pid (\d+)", running.log)[-1])


def launcher_of(running: RunningServer) -> psutil.Process:
    return psutil.Process(launcher_pid(running))


def agent_of(running: RunningServer, model: str) -> psutil.Process:
    return psutil.Process(running.pids(model)[0]).parent() or psutil.Process(0)


@pytest.mark.parametrize("kind", ["ranks", "alone"])
def test_a_fork_is_like_a_process_of_its_own(running: RunningServer, kind: str) -> None:
    forked, plain = (
        [json.loads(json.dumps(rank).replace(name, "MODEL")) for rank in ask(running, name, "facts")]
        for name in (f"{kind}-warm", f"{kind}-torchrun")
    )
    for one, other in zip(forked, plain, strict=True):
        if kind == "ranks":  # libuv's, which the agent's store has brought into its forks
            one["files"].remove("pipe")
            one["files"].remove("pipe")
        assert {name: (one[name], other[name]) for name in one if one[name] != other[name]} == {}
    assert forked[0]["mark"]


@pytest.mark.parametrize("model", ["ranks-warm", "alone-warm"])
def test_handlers_of_forks_may_start_processes_by_fork_and_by_spawn(running: RunningServer, model: str) -> None:
    assert ask(running, model, "children") == [[6, 22, 32]] * len(running.pids(model))
    assert running.restarts(model) == 0


@pytest.mark.parametrize("model", ["ranks-warm", "ranks-torchrun", "alone-warm"])
def test_what_handlers_fork_has_their_files(running: RunningServer, model: str) -> None:
    assert ask(running, model, "lost") == [0] * len(running.pids(model))


def test_chance_is_each_ranks_own(running: RunningServer) -> None:
    forked, plain = (ask(running, model, "chance") for model in ("ranks-warm", "ranks-torchrun"))
    python, numpy, torch = zip(*forked, *plain, strict=True)
    assert len(set(python)) == len(set(numpy)) == len(set(torch)) == 4


def test_ranks_are_forks_of_an_agent_that_is_the_servers_child_as_torchrun_is(running: RunningServer) -> None:
    for model in ("ranks-warm", "ranks-torchrun"):
        assert agent_of(running, model).ppid() == running.process.pid
    assert psutil.Process(running.pids("alone-warm")[0]).ppid() == running.process.pid
    assert "minserve.rank.agent" in agent_of(running, "ranks-warm").cmdline()
    assert "minserve.rank" in psutil.Process(running.pids("ranks-warm")[0]).cmdline()
    assert "minserve.rank.warm" in launcher_of(running).cmdline()
    assert "torch.distributed.run" in agent_of(running, "ranks-torchrun").cmdline()


def test_the_launcher_has_one_thread_and_has_touched_no_device(running: RunningServer) -> None:
    launcher = launcher_of(running)
    assert launcher.num_threads() == 1
    assert not launcher.children()
    maps = Path(f"/proc/{launcher.pid}/maps").read_text()
    assert "libtorch" in maps
    assert "libcuda.so" not in maps
    files = [os.readlink(file) for file in Path(f"/proc/{launcher.pid}/fd").iterdir()]
    assert not [file for file in files if file.startswith("/dev/") and file != "/dev/null"]
    assert len(files) == 4, "stdin, stdout, stderr, the server's socket"


def test_a_death_in_a_collective_is_told_alike(running: RunningServer) -> None:
    told = []
    for model in ("ranks-warm", "ranks-torchrun"):
        restarts, family = running.restarts(model), [agent_of(running, model), *agent_of(running, model).children()]
        answer = running.predict(model, "SIGKILL")
        told.append((answer.status, re.sub(r"\d{3,}", "PID", answer.message.replace(model, "MODEL"))))
        until(lambda: gone(family), GONE_S, "the end of all")  # noqa: B023
        running.wait_until_ready(model, restarts + 1)
    assert told[0] == told[1]
    assert "rank 1 (pid PID)" in told[0][1]


def test_workers_live_on_without_the_launcher_and_the_next_start_makes_another(running: RunningServer) -> None:
    ranks, first = running.pids("ranks-warm"), launcher_of(running)
    restarts = running.restarts("ranks-warm")
    first.kill()
    until(lambda: gone([first]) and f"the warm launcher (pid {first.pid}) was killed by SIGKILL" in running.log)
    assert ask(running, "ranks-warm", "chance")
    assert running.pids("ranks-warm") == ranks
    os.kill(ranks[1], signal.SIGKILL)
    running.wait_until_ready("ranks-warm", restarts + 1)
    assert launcher_of(running).pid != first.pid
    assert f"rank 1 (pid {ranks[1]}) was killed by SIGKILL" in running.log
    assert ask(running, "ranks-warm", "chance")


def test_a_launcher_that_does_not_answer_is_done_without(running: RunningServer) -> None:
    stopped = launcher_of(running)
    stopped.suspend()
    os.kill(running.pids("alone-warm")[0], signal.SIGKILL)
    running.wait_until_ready("alone-warm", 1)
    assert gone([stopped])
    assert "alone-warm/0: started without the warm launcher" in running.log
    assert ask(running, "alone-warm", "chance")


def test_whoever_is_killed_just_after_a_fork_leaves_nothing(running: RunningServer) -> None:
    """Also when it is the launcher, whose forks are the server's: that start begins anew."""
    if not psutil.pid_exists(launcher_pid(running)):  # the next start only makes one
        restarts = running.restarts("ranks-warm")
        os.kill(running.pids("ranks-warm")[0], signal.SIGKILL)
        running.wait_until_ready("ranks-warm", restarts + 1)
    starts, restarts = running.log.count("ranks-warm/0: start:"), running.restarts("ranks-warm")
    os.kill(running.pids("ranks-warm")[0], signal.SIGKILL)
    until(lambda: running.log.count("ranks-warm/0: start:") > starts)
    time.sleep(0.003)
    launcher_of(running).kill()
    running.wait_until_ready("ranks-warm", restarts + 1)
    assert ask(running, "ranks-warm", "chance")
    children = {one.pid for one in running.family() if one.ppid() == running.process.pid}
    assert len(children - {launcher_pid(running)}) == 4 + 1, "of four models, and the guardian"


def test_a_server_killed_just_after_a_fork_leaves_nothing(tmp_path: Path) -> None:
    with server(copy(tmp_path, "ranks", "warm"), options=("--log-level", "debug"), started=False) as running:
        until(lambda: "forked by the warm launcher" in running.log, 90)
        family = running.family()
        time.sleep(0.01)
        family += running.family()
        running.process.kill()
        running.process.wait()
        until(lambda: gone(family), GONE_S, "the end of all")
