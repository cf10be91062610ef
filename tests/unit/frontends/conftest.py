from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from minserve.config.server import ServerOptions
from tests.unit.frontend.conftest import held, options
from tests.unit.frontend.rig import FakeSupervisor
from tests.unit.frontends.rig import Behind

__all__ = ["held", "options"]


@pytest_asyncio.fixture
async def rig(options: ServerOptions, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Behind]:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    async with Behind(options) as rig:
        yield rig
