"""How the tests run: in how many processes, and on which event loops."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import hypothesis
import pytest
import uvloop

MOST_PROCESSES = 4  # a file of integration tests starts servers of up to eight ranks

# Another file's servers may have the cores for a while: that an example takes long says nothing.
hypothesis.settings.register_profile(
    "beside others", hypothesis.settings(), deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("beside others")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Without pytest-xdist (`-p no:xdist`) its options in pyproject.toml are there, too, and mean nothing."""
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--numprocesses")
        parser.addoption("--dist")
        parser.addoption("--no-loadscope-reorder", action="store_true")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` means: as many as there are cores, for servers under test and their ranks need these, too.

    Files are what is shared out: more processes than files would do nothing, and a single file runs in the process that
    was started (0), where it can be debugged.
    """
    files = {argument.partition("::")[0] for argument in config.args}
    processes = min(max(len(os.sched_getaffinity(0)), 2), MOST_PROCESSES)
    if all(Path(file).is_file() for file in files):
        processes = min(processes, len(files))
    return processes if processes > 1 else 0


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
