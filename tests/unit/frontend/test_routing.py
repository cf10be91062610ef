import json

import pytest

from tests.unit.frontend.rig import Rig
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    ("side", "method", "path", "status", "type_name"),
    [
        ("inference", "GET", "/", 405, "MethodNotAllowedException"),
        ("inference", "GET", "/models", 404, "ResourceNotFoundException"),
        ("inference", "TRACE", "/predictions/m", 405, "MethodNotAllowedException"),
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


@pytest.mark.parametrize(
    ("side", "method", "path", "allowed"),
    [
        ("inference", "TRACE", "/predictions/m", "DELETE, GET, OPTIONS, PATCH, POST, PUT"),
        ("inference", "TRACE", "/predictions/m/1.0", "DELETE, GET, OPTIONS, PATCH, POST, PUT"),
        ("inference", "HEAD", "/predictions/m/1.0/a/path", "DELETE, GET, OPTIONS, PATCH, POST, PUT"),
        ("inference", "POST", "/readyz", "GET, HEAD, OPTIONS"),
        ("management", "POST", "/models", "GET, HEAD, OPTIONS"),
        ("management", "DELETE", "/models/m/", "GET, HEAD, OPTIONS, PUT"),
        ("management", "POST", "/models/m/1.0", "GET, HEAD, OPTIONS, PUT"),
        ("management", "GET", "/models/m/1.0/set-default", "OPTIONS, PUT"),
        ("management", "POST", "/v1/models/m", "GET, HEAD, OPTIONS"),
        ("management", "GET", "/models/m/reload", "OPTIONS, POST"),
    ],
)
async def test_a_405_says_which_methods_there_are(rig: Rig, side: str, method: str, path: str, allowed: str) -> None:
    client = rig.inference if side == "inference" else rig.management
    async with client.request(method, path) as response:
        assert (response.status, response.headers["Allow"]) == (405, allowed)


async def test_a_slash_at_the_end_changes_nothing(rig: Rig) -> None:
    for path in ("/ping/", "/predictions/m/"):
        async with rig.inference.get(path) as response:
            assert response.status == 200
    async with rig.management.get("/models/") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"GET http://elsewhere/ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),  # as from a proxy
        (b"GET //ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"GET /%2e%2e/ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    ],
)
async def test_targets_of_all_forms_find_their_route_or_none(rig: Rig, data: bytes, status: int) -> None:
    assert (await rig.raw(data))[0] == status


@pytest.mark.parametrize("target", [b"CONNECT x:443", b"GET http://x", b"GET http://x?a=1"])
async def test_a_target_without_a_path_is_refused_and_what_follows_is_no_request(rig: Rig, target: bytes) -> None:
    """Behind CONNECT it is meant for a tunnel."""
    async with rig.client() as client:
        client.send(target + b" HTTP/1.1\r\nHost: x\r\n\r\nPOST /predictions/m HTTP/1.1\r\nHost: x\r\n\r\n")
        status, head, body = await client.answer()
        assert (status, json.loads(body)["type"]) == (404, "ResourceNotFoundException")
        assert b"\r\nConnection: close\r\n" in head
        assert b"\r\nContent-Type: application/json\r\n" in head
        assert await client.rest() == b""
    assert rig.lane.requests == []


async def test_an_upgrade_that_is_not_offered_is_answered_as_if_it_had_not_been_asked_for(rig: Rig) -> None:
    one = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
    async with rig.client() as client:
        client.send(one + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + one + b"\r\n")
        for _ in range(2):
            assert (await client.answer())[0] == 200
    await until(lambda: len(rig.lane.requests) == 2)
