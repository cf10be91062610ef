import pytest
from aiohttp import hdrs

from tests.unit.frontend.rig import Rig, with_options

pytestmark = pytest.mark.asyncio

PREFLIGHT = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
ORIGIN, METHODS, HEADERS = (
    hdrs.ACCESS_CONTROL_ALLOW_ORIGIN,
    hdrs.ACCESS_CONTROL_ALLOW_METHODS,
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS,
)
ALL = {
    "cors_allowed_origin": "http://a.example",
    "cors_allowed_methods": "GET, POST",
    "cors_allowed_headers": "Authorization",
}


async def test_without_options_there_is_no_such_header(rig: Rig) -> None:
    async with rig.inference.get("/ping", headers={"Origin": "http://a.example"}) as response:
        assert not [name for name in response.headers if name.startswith("Access-Control")]
    async with rig.inference.options("/predictions/m", headers=PREFLIGHT) as response:
        assert (response.status, response.headers.get(ORIGIN)) == (200, None)


@with_options(**ALL)
async def test_every_answer_carries_what_is_configured(rig: Rig) -> None:
    for client, path, status in (
        (rig.inference, "/ping", 200),
        (rig.inference, "/predictions/m", 200),
        (rig.inference, "/predictions/none", 404),
        (rig.management, "/models", 200),
    ):
        async with client.get(path) as response:
            assert response.status == status
            assert [response.headers[name] for name in (ORIGIN, METHODS, HEADERS)] == list(ALL.values())
            assert "Vary" not in response.headers


@with_options(cors_allowed_headers="X-A")
async def test_each_header_stands_alone(rig: Rig) -> None:
    async with rig.inference.get("/ping") as response:
        assert response.headers[HEADERS] == "X-A"
        assert not {ORIGIN, METHODS} & response.headers.keys()


@with_options(**ALL)
async def test_a_preflight_is_answered_and_reaches_no_handler(rig: Rig) -> None:
    for client, path in ((rig.inference, "/predictions/m"), (rig.inference, "/ping"), (rig.management, "/models/m")):
        async with client.options(path, headers=PREFLIGHT) as response:
            assert (response.status, await response.read()) == (204, b"")
            assert [response.headers[name] for name in (ORIGIN, METHODS, HEADERS)] == list(ALL.values())
    assert rig.lane.requests == []
    async with rig.inference.options("/predictions/m") as response:
        assert response.status == 200, "no preflight: the description of the path"


@with_options(cors_allowed_origin="http://a.example, http://b.example")
async def test_of_several_origins_the_one_that_asks_is_named(rig: Rig) -> None:
    for asking, named in (
        ("http://b.example", "http://b.example"),
        ("http://a.example", "http://a.example"),
        ("http://evil.example", "http://a.example"),
    ):
        async with rig.inference.get("/ping", headers={"Origin": asking}) as response:
            assert (response.headers[ORIGIN], response.headers["Vary"]) == (named, "Origin")
