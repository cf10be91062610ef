"""How the tests run: in how many processes, and on which event loops."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uvloop

MOST_PROCESSES = 4  # a file of integration tests starts servers of up to eight ranks


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Files are shared out over the cores. A single one, or tests of it, needs no other process (0)."""
    if (
        len({argument.split("::")[0] for argument in config.args}) == 1
        and Path(config.args[0].split("::")[0]).is_file()
    ):
        return 0
    return min(len(os.sched_getaffinity(0)) + 1, MOST_PROCESSES)


def pytest_collection_finish() -> None:
    """What is there by now stays to the end. Each of the many collections to come would look at all of it again."""
    gc.collect()
    gc.freeze()


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Unit tests run on both loops; integration tests only send requests, and one loop does."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    own_loop = item.path.parent.name == "frontends"  # a frontend process runs on uvloop alone
    if "integration" not in item.path.parts and not own_loop:
        factories["asyncio"] = asyncio.new_event_loop
    return factories
