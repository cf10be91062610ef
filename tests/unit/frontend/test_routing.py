import json

import pytest

from tests.unit.frontend.rig import Rig

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    ("side", "method", "path", "status", "type_name"),
    [
        ("inference", "GET", "/", 404, "ResourceNotFoundException"),
        ("inference", "GET", "/models", 404, "ResourceNotFoundException"),
        ("inference", "OPTIONS", "/predictions/m", 405, "MethodNotAllowedException"),
        ("inference", "HEAD", "/predictions/m", 405, ""),
        ("management", "POST", "/predictions/m", 404, "ResourceNotFoundException"),
        ("management", "DELETE", "/models/m", 405, "MethodNotAllowedException"),
        ("management", "GET", "/models/none", 404, "ModelNotFoundException"),
        ("management", "GET", "/models/none/all", 404, "ModelNotFoundException"),
        ("management", "GET", "/models/m/2.0", 404, "ModelVersionNotFoundException"),
    ],
)
async def test_what_the_router_refuses_is_json_too(
    rig: Rig, side: str, method: str, path: str, status: int, type_name: str
) -> None:
    client = rig.inference if side == "inference" else rig.management
    async with client.request(method, path) as response:
        assert (response.status, response.content_type) == (status, "application/json")
        assert "x-request-id" in response.headers
        if method != "HEAD":
            answer = json.loads(await response.text())
            assert (answer["code"], answer["type"]) == (status, type_name)


async def test_management_answers_head_as_get_without_a_body(rig: Rig) -> None:
    for path in ("/models", "/models/m"):
        async with rig.management.head(path) as response:
            assert (response.status, await response.read()) == (200, b"")
            assert int(response.headers["Content-Length"]) > 50
