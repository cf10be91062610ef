from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from minserve.config.server import ServerOptions
from minserve.dispatch.request import Request
from tests.unit.frontend.rig import OPTIONS, FakeSupervisor, Rig


@pytest.fixture
def options(request: pytest.FixtureRequest) -> ServerOptions:
    """The server's; `with_options` changes them."""
    options: ServerOptions = getattr(request, "param", OPTIONS)
    return options


@pytest.fixture
def express() -> bool:
    """Whether requests may be carried past aiohttp. Tests of what both ways have in common are run for both."""
    return True


@pytest_asyncio.fixture
async def rig(options: ServerOptions, express: bool, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    async with Rig(options, express=express) as rig:
        yield rig


@pytest.fixture
def held(rig: Rig) -> list[Request]:
    """Requests whose answers the test sends."""
    requests: list[Request] = []
    rig.lane.handle = requests.append
    return requests
