import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig

from minserve.rank import agent

GUARDED = """
import os, signal
from minserve.rank.agent import _guard_forks
def handler(*_): raise RuntimeError("torchrun's")
signal.signal(signal.SIGTERM, handler)
_guard_forks(os.getpid())
rank = os.fork()
if rank == 0:
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.pthread_sigmask(0, []), flush=True)
    if os.fork() == 0:
        os._exit(0)  # what a rank forks is its own affair
    os.wait()
    os._exit(0)
os.waitpid(rank, 0)
print(signal.getsignal(signal.SIGTERM) is handler, signal.pthread_sigmask(0, []))
"""


def test_a_rank_has_the_signals_of_a_new_process_and_the_agent_keeps_its_own() -> None:
    ended = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "True set()\nTrue set()\n"


REOPENING = """
import os
from minserve.rank import forked
from minserve.rank.agent import _guard_forks
pipe = [os.open(os.devnull, os.O_RDONLY), *os.pipe()][1:]
def as_libuv():
    for number in pipe:
        try: os.close(number)
        except OSError: pass
    pipe[:] = os.pipe()
os.register_at_fork(after_in_child=as_libuv)
made = _guard_forks(os.getpid())
if os.fork() == 0:
    forked.close_files(but=made)
    mine = {number: os.fstat(number).st_ino for number in [*os.pipe(), *os.pipe()]}
    if os.fork() == 0:
        print(made == set(pipe), all(os.fstat(number).st_ino == mine[number] for number in mine), flush=True)
        os._exit(0)
    os.wait()
    os._exit(0)
os.wait()
"""


def test_what_a_rank_forks_finds_the_ranks_files_under_their_numbers() -> None:
    """A library that opens its files anew in each fork closes the numbers that they had."""
    ended = subprocess.run([sys.executable, "-c", REOPENING], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "True True\n"


def test_the_agent_never_asks_cuda_whose_forks_would_have_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def available() -> bool:
        pytest.fail("this starts CUDA")

    made = LaunchConfig.__post_init__

    def asks(config: LaunchConfig) -> None:
        """As a newer torch does, also under an older one."""
        torch.cuda.is_available()
        made(config)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(LaunchConfig, "__post_init__", asks)
    # Without a folder of its own torch makes one in /tmp.
    options = ["--nnodes", "1", "--nproc-per-node", "2", "--log-dir", str(tmp_path)]
    config = agent._config([*options, "-m", "minserve.rank"])
    assert (config.nproc_per_node, config.start_method) == (2, "fork")
    assert torch.cuda.is_available is available


def test_what_torch_says_of_a_failed_rank_comes_without_its_own_traceback(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("a test's")
    logger.addFilter(agent._without_traceback)
    try:
        raise RuntimeError
    except RuntimeError:
        logger.exception("failed (exitcode: 1)")
    assert [(record.message, record.exc_info) for record in caplog.records] == [("failed (exitcode: 1)", None)]
