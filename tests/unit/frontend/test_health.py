import json

import pytest

from minserve.errors import ConfigError, WorkerFailed
from tests.unit.frontend.rig import Client, Rig

pytestmark = pytest.mark.asyncio


async def ping(client: Client, method: str = "GET") -> tuple[int, object]:
    async with client.request(method, "/ping") as response:
        return response.status, json.loads(await response.text())


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_both_ports_are_healthy_while_no_model_has_given_up(rig: Rig, method: str) -> None:
    for client in (rig.inference, rig.management):
        assert await ping(client, method) == (200, {"status": "Healthy"})


async def test_a_model_that_has_given_up_is_named_with_its_reason(rig: Rig) -> None:
    rig.add("good")
    rig.supervisor("m").unhealthy = WorkerFailed("m/0: rank 1 cannot load: no weights")
    for client in (rig.inference, rig.management):
        assert await ping(client) == (
            500,
            {"status": "Unhealthy", "models": {"m": "m/0: rank 1 cannot load: no weights"}},
        )


async def test_a_model_with_a_wrong_configuration_is_named_without_its_details(rig: Rig) -> None:
    rig.registry.broken = {"bad": ConfigError("/secret/path:3: key")}
    status, answer = await ping(rig.inference)
    assert status == 500
    assert answer == {"status": "Unhealthy", "models": {"bad": "its configuration is wrong, see the log"}}
