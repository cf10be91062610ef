"""The agent of a rank group in a fork of the warm launcher: torchrun's own code, but its ranks are forks.

The arguments are those of a plain torchrun, read by torchrun's parser; the agent, its rendezvous and its monitoring are
torch.distributed.elastic's. Only the start of a rank differs: `fork` with a function in place of an exec.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from minserve.rank import forked, process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.launcher.api import LaunchConfig

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by torchrun, to end its ranks


def run(arguments: Sequence[str]) -> None:
    """Runs torchrun with these arguments.

    Raises:
        ChildFailedError: a rank has failed; also whatever else torchrun ends with.
    """
    from torch.distributed.elastic import multiprocessing
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.launcher.api import elastic_launch

    config = _config(arguments)
    agent = os.getpid()
    made = _guard_forks(agent)
    logging.getLogger(multiprocessing.api.__name__).addFilter(_without_traceback)

    def rank() -> None:
        _become_rank(agent, made)

    rank.__name__ = rank.__qualname__ = "minserve.rank"  # in what torchrun reports
    record(elastic_launch(config, rank))()


def _config(arguments: Sequence[str]) -> LaunchConfig:
    """What torchrun makes of its arguments, without a look at CUDA.

    A newer torch asks for the GPUs, to bind each rank to the CPUs near its own. That starts CUDA in the agent, and a fork
    of a process with CUDA has none: its ranks would be on the CPU, or fail. So here nothing is bound.
    """
    import torch.cuda
    from torch.distributed.run import config_from_args, parse_args

    options = parse_args(list(arguments))  # type: ignore[no-untyped-call]
    options.start_method = "fork"
    is_available, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    try:
        config, _, _ = config_from_args(options)
    finally:
        torch.cuda.is_available = is_available
    return config


def _without_traceback(record: logging.LogRecord) -> bool:
    """Of a rank that has failed, where it is torch's own. To print one torch imports its compiler, for seconds."""
    record.exc_info = None
    return True


def _guard_forks(agent: int) -> set[int]:
    """A signal that comes while a rank is forked waits, and then meets the rank's own handlers, not torchrun's.

    Those would raise in the middle of the fork, and the rank would seem to have exited by itself.

    Returns:
        In a rank the files that the fork has opened there: those of C libraries that set themselves up anew in the child.
        libuv is one, by which the agent's store listens.
    """
    before: set[str] = set()
    made: set[int] = set()

    def block() -> None:
        if os.getpid() == agent:
            before.clear()
            before.update(forked.open_files().values())
            signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)

    def in_agent() -> None:
        if os.getpid() == agent:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    def in_rank() -> None:
        if os.getppid() == agent:
            forked.reset_signals()
            made.update(number for number, file in forked.open_files().items() if file not in before)

    os.register_at_fork(before=block, after_in_parent=in_agent, after_in_child=in_rank)
    return made


def _become_rank(agent: int, made: set[int]) -> NoReturn:
    """In the rank, with its environment set, deep inside multiprocessing. It never comes back."""
    os.setsid()
    if not process.die_with(agent):
        os._exit(1)
    if not os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.disable()  # the agent's code has enabled it
    # What the fork has made must stay: in the handler's own forks libuv closes it by number, whatever has that number then.
    forked.close_files(but=made)  # the others' owners stay referenced by the frames above to the end
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # multiprocessing's is among those closed
    forked.leave(forked.run_rank)
