import socket

import pytest
from aiohttp import HttpVersion10, HttpVersion11
from aiohttp.test_utils import make_mocked_request

from minserve.errors import BadRequest, Forbidden
from minserve.frontend.cors import Cors
from minserve.frontend.guard import Guard
from tests.unit.frontend.rig import OPTIONS, Rig, with_options

NO_CORS = Cors(OPTIONS)
SOME = make_mocked_request("GET", "/models", {})


def passes(guard: Guard, target: str = "/models", **headers: str) -> bool:
    request = make_mocked_request("GET", target, headers) if "://" in target else SOME.clone(headers=headers)
    try:
        guard(request)
    except Forbidden:
        return False
    return True


LOOPBACK = [
    "localhost",
    "LOCALHOST:8081",
    "a.localhost",
    "localhost.",
    "127.0.0.1",
    "127.1.2.3:8081",
    "[::1]",
    "[::1]:8081",
]
FOREIGN = ["evil.example", "evil.example:8081", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost"]
MALFORMED = [
    "",
    ":8081",
    "a b",
    "localhost/x",
    "user@localhost",
    "localhost:x",
    "[::1",
    "localhost:80:80",
    "localhost, x",
]


@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.5"])
def test_loopback_is_allowed_wherever_the_server_listens_and_a_foreign_name_nowhere(bound: str) -> None:
    guard = Guard(bound, (), NO_CORS)
    assert [host for host in LOOPBACK if not passes(guard, Host=host)] == []
    assert [host for host in FOREIGN + MALFORMED if passes(guard, Host=host)] == []


def test_addresses_and_the_machines_name_are_allowed_where_the_server_is_open_to_others() -> None:
    own = socket.gethostname()
    for host in ("10.0.0.5:8081", "[fe80::1]", own, f"{own}:8081"):
        assert passes(Guard("0.0.0.0", (), NO_CORS), Host=host)
        assert not passes(Guard("127.0.0.1", (), NO_CORS), Host=host)


def test_the_bound_name_and_the_allowed_ones() -> None:
    guard = Guard("gpu.example", ["Models.example.org", ".svc.cluster.local"], NO_CORS)
    for host in ("gpu.example", "models.example.org:8081", "a.svc.cluster.local", "a.b.svc.cluster.local:1"):
        assert passes(guard, Host=host)
    for host in ("a.gpu.example", "example", "a.models.example.org", "svc.cluster.local", "xsvc.cluster.local"):
        assert not passes(guard, Host=host)
    assert passes(Guard("127.0.0.1", ["*"], NO_CORS), Host="anything.example")


def test_a_target_with_a_host_counts_beside_the_header() -> None:
    guard = Guard("127.0.0.1", (), NO_CORS)
    assert passes(guard, "http://localhost:8081/models", Host="localhost:8081")
    assert not passes(guard, "http://evil.example/models", Host="localhost:8081")
    assert not passes(guard, "http://localhost:8081/models", Host="evil.example")


def test_a_request_without_a_host_is_http_1_0s() -> None:
    guard = Guard("127.0.0.1", (), NO_CORS)
    guard(make_mocked_request("GET", "/", {}, version=HttpVersion10))
    with pytest.raises(BadRequest):
        guard(make_mocked_request("GET", "/", {}, version=HttpVersion11))


@pytest.mark.parametrize(
    ("origin", "host", "ours"),
    [
        ("http://localhost:8081", "localhost:8081", True),
        ("http://localhost:18081", "localhost:18081", True),  # through a port mapping
        ("http://localhost", "localhost:80", True),
        ("https://localhost", "localhost", True),  # through a proxy that ends TLS
        ("http://[::1]:8081", "[::1]:8081", True),
        ("http://localhost:3000", "localhost:8081", False),
        ("http://127.0.0.1:8081", "localhost:8081", False),
        ("http://evil.example", "localhost:8081", False),
        ("http://localhost:8081.evil.example", "localhost:8081", False),
        ("null", "localhost:8081", False),
        ("", "localhost:8081", False),
        ("file://", "localhost:8081", False),
    ],
)
def test_pages_of_other_origins_are_refused(origin: str, host: str, ours: bool) -> None:
    assert passes(Guard("127.0.0.1", (), NO_CORS), Host=host, Origin=origin) is ours


def test_pages_that_cors_allows_may_call() -> None:
    cors = Cors(OPTIONS.model_copy(update={"cors_allowed_origin": "http://ui.example"}))
    guard = Guard("127.0.0.1", (), cors)
    assert passes(guard, Host="localhost", Origin="http://ui.example")
    assert not passes(guard, Host="localhost", Origin="http://evil.example")


@pytest.mark.asyncio
async def test_management_is_guarded_and_inference_is_not(rig: Rig) -> None:
    for path in ("/models", "/models/none", "/livez", "/docs", "/api-description", "/nowhere"):
        async with rig.management.get(path, headers={"Host": "evil.example"}) as response:
            assert (response.status, (await response.json())["type"]) == (403, "ForbiddenException")
    async with rig.management.get("/models", headers={"Origin": "http://evil.example"}) as response:
        assert (response.status, (await response.json())["type"]) == (403, "ForbiddenException")
    headers = {"Host": "evil.example", "Origin": "http://evil.example"}
    async with rig.inference.post("/predictions/m", data=b"1", headers=headers) as response:
        assert response.status == 200


@pytest.mark.asyncio
@with_options(management_address="unix:/run/x")
async def test_no_page_reaches_a_unix_socket(rig: Rig) -> None:
    async with rig.management.get("/models", headers={"Host": "whatever"}) as response:
        assert response.status == 200
