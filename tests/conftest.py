"""Which event loops the asyncio tests run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Unit tests run on both loops; integration tests only send requests, and one loop does."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    own_loop = item.path.parent.name == "frontends"  # a frontend process runs on uvloop alone
    if "integration" not in item.path.parts and not own_loop:
        factories["asyncio"] = asyncio.new_event_loop
    return factories
