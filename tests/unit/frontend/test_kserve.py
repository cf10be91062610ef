import json

import pytest

import minserve
from minserve.worker.states import State
from tests.unit.frontend.rig import Client, Rig
from tests.unit.frontend.test_management import report

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        ("/v1/models/m:predict", ""),
        ("/v1/models/m:explain", "explain"),
        ("/v2/models/m/infer", ""),
        ("/v2/models/m/explain", "explain"),
        ("/v2/models/m/versions/1.0/infer", ""),
        ("/v2/models/m/versions/1.0/explain", "explain"),
        ("/explanations/m", "explain"),
        ("/explanations/m/1.0", "explain"),
    ],
)
async def test_every_path_reaches_the_model_with_its_operation(rig: Rig, path: str, operation: str) -> None:
    body = b'{"instances": [1]}'
    async with rig.inference.post(path, data=body, headers={"Content-Type": "application/json"}) as response:
        assert (response.status, await response.read()) == (200, body)
    assert rig.lane.parts() == [("body", "application/json", body)]
    assert rig.lane.requests[-1].meta.operation == operation


@pytest.mark.parametrize(
    "path",
    ["/v1/models/none:predict", "/v2/models/none/infer", "/v2/models/m/versions/2/infer", "/v2/models/none/ready"],
)
async def test_what_is_not_there_is_a_404(rig: Rig, path: str) -> None:
    async with rig.inference.get(path) as response:
        assert response.status == 404
        assert json.loads(await response.text())["type"].endswith("NotFoundException")


async def test_v1_has_four_segments(rig: Rig) -> None:
    for path in ("/v1/models/m:nonsense", "/v1/models/m", "/v1/models/m:predict/more"):
        async with rig.inference.post(path, data=b"x") as response:
            assert response.status == 404, path


# ── state ──


async def get(client: Client, path: str) -> tuple[int, object]:
    async with client.get(path) as response:
        return response.status, json.loads(await response.text())


async def test_readiness_is_the_models_and_not_a_constant(rig: Rig) -> None:
    supervisor = rig.supervisor()
    for state, not_ready, ready in (
        (State.LOADING, "m/0 is LOADING", False),
        (State.READY, None, True),
        (State.BUSY, None, True),
        (State.FAILED, "m/0 is FAILED", False),
    ):
        supervisor.reports, supervisor.not_ready = [report(state=state)], not_ready
        status = 200 if ready else 503
        assert await get(rig.management, "/v1/models/m") == (200, {"name": "m", "ready": ready})
        assert await get(rig.inference, "/v2/models/m/ready") == (status, {"name": "m", "ready": ready})
        assert await get(rig.inference, "/v2/health/ready") == (status, {"ready": ready})
        assert await get(rig.inference, "/v2/health/live") == (200, {"live": True})


async def test_a_model_without_workers_is_not_ready_and_its_server_is(rig: Rig) -> None:
    """Nobody has asked for one."""
    rig.supervisor().reports = []
    assert await get(rig.management, "/v1/models/m") == (200, {"name": "m", "ready": False})
    assert await get(rig.inference, "/v2/models/m/ready") == (503, {"name": "m", "ready": False})
    assert await get(rig.inference, "/v2/health/ready") == (200, {"ready": True})


async def test_a_server_that_stops_is_not_ready(rig: Rig) -> None:
    rig.registry.stopping = True
    assert await get(rig.inference, "/v2/health/ready") == (503, {"ready": False})


async def test_the_server_tells_its_name_and_version(rig: Rig) -> None:
    status, answer = await get(rig.inference, "/v2")
    assert isinstance(answer, dict)
    assert (status, answer["name"], answer["version"]) == (200, "minserve", minserve.__version__)
    assert answer["extenstion"] == answer["extensions"] == ["kserve", "kubeflow"]


async def test_v1_readiness_of_a_model_that_is_not_there_is_a_404(rig: Rig) -> None:
    status, _ = await get(rig.management, "/v1/models/none")
    assert status == 404
