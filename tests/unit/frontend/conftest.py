from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.unit.frontend.rig import FakeSupervisor, Rig


@pytest_asyncio.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr("minserve.registry.models.Supervisor", FakeSupervisor)
    async with Rig() as rig:
        yield rig
