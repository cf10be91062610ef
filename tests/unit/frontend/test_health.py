import json

import pytest

from minserve.errors import ConfigError, WorkerFailed
from tests.unit.frontend.rig import Client, FakeSupervisor, Rig, with_options

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


@with_options(lenient=True)
async def test_an_archive_that_cannot_be_read_makes_no_server_of_torchserves_unhealthy(rig: Rig) -> None:
    rig.registry.broken = {"junk": ConfigError("junk.mar: is neither a zip archive nor a tar archive in gzip")}
    assert await ping(rig.inference) == (200, {"status": "Healthy"})
    assert (await get(rig.inference, "/readyz"))[0] == 503, "but it is not ready either"


async def test_a_server_without_models_is_healthy_and_ready(rig: Rig) -> None:
    await rig.registry.unregister("m")
    assert await ping(rig.inference) == (200, {"status": "Healthy"})
    assert await get(rig.inference, "/readyz") == (200, {"status": "ready"})


async def test_only_the_default_version_counts(rig: Rig) -> None:
    """Or a new version that is being loaded would take requests away from the old one."""
    rig.add("m", version="2.0")
    for version, healthy in (("2.0", True), ("1.0", False)):
        supervisor: object = rig.registry.find("m", version).supervisor
        assert isinstance(supervisor, FakeSupervisor)
        supervisor.unhealthy = WorkerFailed("m:2.0/0: no weights")
        supervisor.not_ready = "it has given up"
        assert (await ping(rig.inference))[0] == (200 if healthy else 500)
        assert (await get(rig.inference, "/readyz"))[0] == (200 if healthy else 503)


# ── /livez, /readyz ──


async def get(client: Client, path: str, method: str = "GET") -> tuple[int, object]:
    async with client.request(method, path) as response:
        assert response.content_type == "application/json"
        text = await response.text()
        return response.status, json.loads(text) if text else None


async def test_a_server_is_live_and_ready_while_every_model_takes_requests(rig: Rig) -> None:
    rig.add("good")
    for client in (rig.inference, rig.management):
        assert await get(client, "/livez") == (200, {"status": "live"})
        assert await get(client, "/readyz") == (200, {"status": "ready"})
        assert await get(client, "/readyz", "HEAD") == (200, None)


async def test_a_model_that_is_not_ready_is_named_with_its_reason_and_no_restart_is_asked_for(rig: Rig) -> None:
    rig.add("good")
    rig.supervisor("m").not_ready = "its only worker is LOADING"
    for client in (rig.inference, rig.management):
        assert await get(client, "/readyz") == (
            503,
            {"status": "not ready", "models": {"m": "its only worker is LOADING"}},
        )
        assert await get(client, "/readyz", "HEAD") == (503, None)
        assert await get(client, "/livez") == (200, {"status": "live"})
        assert await get(client, "/ping") == (200, {"status": "Healthy"}), "it may come yet"
    rig.supervisor("m").not_ready = None
    assert await get(rig.inference, "/readyz") == (200, {"status": "ready"})


async def test_each_of_several_models_has_its_reason(rig: Rig) -> None:
    rig.registry.broken = {"bad": ConfigError("/secret/path:3: key")}
    rig.supervisor("m").not_ready = "it has given up"
    assert await get(rig.inference, "/readyz") == (
        503,
        {"status": "not ready", "models": {"m": "it has given up", "bad": "its configuration is wrong, see the log"}},
    )


async def test_a_server_that_stops_is_live_and_not_ready(rig: Rig) -> None:
    rig.registry.stopping = True
    assert await get(rig.inference, "/readyz") == (
        503,
        {"status": "not ready", "reason": "the server is stopping", "models": {}},
    )
    assert await get(rig.inference, "/livez") == (200, {"status": "live"})
    async with rig.inference.post("/predictions/m", data=b"still served") as response:
        assert (response.status, await response.read()) == (200, b"still served")


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
async def test_health_is_only_read(rig: Rig, path: str) -> None:
    async with rig.inference.post(path) as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
