from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from minserve.config.server import ServerOptions
from tests.unit.frontend.conftest import express, held, options
from tests.unit.frontend.rig import FakeSupervisor
from tests.unit.frontends.rig import Behind

__all__ = ["express", "held", "options"]


@pytest_asyncio.fixture
async def rig(options: ServerOptions, express: bool, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Behind]:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    async with Behind(options, express=express) as rig:
        yield rig
