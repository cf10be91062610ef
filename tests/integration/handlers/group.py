"""Runs a function on every rank of a real gloo group, without the cost of torchrun: some 0.2 s for each group.

The ranks are forked from a server process that has torch imported and no threads. Forking pytest itself would copy torch's
thread pools half-alive.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["minserve.handlers.mesh", "minserve.handlers.pipeline", "pytest"])


def run_group(
    tmp_path: Path,
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60,
    one_agent: bool = False,
) -> list[Any]:
    """Calls `function(rank, *args)` on `world` ranks and returns what they returned, by rank.

    Fails with the rank's traceback if one raises, and kills all of them when `timeout` seconds have passed.

    Args:
        one_agent: the environment is that of ranks which one torchrun has started.
    """
    environ = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)} if one_agent else {}
    deadline = time.monotonic() + timeout
    ranks = []
    for rank in range(world):
        ours, theirs = _context.Pipe()
        process = _context.Process(
            target=_rank, args=(theirs, tmp_path / "store", rank, world, environ, function, args)
        )
        process.start()
        theirs.close()  # so that the death of the rank is an EOF here
        ranks.append((process, ours))
    try:
        return [_result(rank, pipe, deadline) for rank, (_, pipe) in enumerate(ranks)]
    finally:
        for _, pipe in ranks:
            pipe.close()
        for process, _ in ranks:
            process.join(1)  # a rank that has answered only has to leave the group
            process.kill()
            process.join()


def _result(rank: int, pipe: Connection, deadline: float) -> Any:
    if not pipe.poll(max(0, deadline - time.monotonic())):
        raise TimeoutError(f"rank {rank} did not finish")
    try:
        done, result = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    if not done:
        raise AssertionError(f"rank {rank}:\n{result}")
    return result


def _rank(
    pipe: Connection,
    store: Path,
    rank: int,
    world: int,
    environ: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environ, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    try:
        answer = (True, function(rank, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    # By value and without pickle's own idea of tensors, which knows no float8.
    answer_bytes = io.BytesIO()
    torch.save(answer, answer_bytes)
    pipe.send_bytes(answer_bytes.getvalue())
    if dist.is_initialized():  # else the function has left it
        with contextlib.suppress(EOFError):
            pipe.recv_bytes()  # until all have answered: others may still be making a group with this one
        dist.destroy_process_group()
