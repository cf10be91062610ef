import uuid

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from minserve.frontend.headers import ID, REQUEST_ID, UNTYPED, finish_headers, request_id
from minserve.wire.messages import Answer
from tests.unit.frontend.rig import Rig

HEAD = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nx-request-id: mine\r\n"


@pytest.mark.parametrize("given", ["a", "A-Z.a_z-0", "x" * 128])
def test_an_id_that_is_fit_for_a_log_is_kept(given: str) -> None:
    assert request_id({REQUEST_ID: given}) == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\n", "a;b", "ä", "../a"])
def test_any_other_id_is_replaced(given: str) -> None:
    assert request_id({REQUEST_ID: given}) not in ("", given)


def test_fresh_ids_are_random_uuids_and_differ() -> None:
    ids = {request_id({}) for _ in range(100)}
    assert len(ids) == 100
    for one in ids:
        parsed = uuid.UUID(one)
        assert (str(parsed), parsed.version, parsed.variant) == (one, 4, uuid.RFC_4122)


@pytest.mark.asyncio
async def test_an_answer_has_the_id_that_the_handler_has_seen() -> None:
    request = make_mocked_request("POST", "/")
    request[ID] = "seen"
    for response, expected in ((web.Response(), "seen"), (web.Response(headers={REQUEST_ID: "set"}), "set")):
        finish_headers(request, response)
        assert response.headers.getall(REQUEST_ID) == [expected]


@pytest.mark.asyncio
@pytest.mark.parametrize(("given", "sent"), [(UNTYPED, None), ("text/plain", "text/plain")])
async def test_an_answer_without_a_content_type_gets_none(given: str, sent: str | None) -> None:
    response = web.Response(headers={"Content-Type": given})
    finish_headers(make_mocked_request("POST", "/"), response)
    assert response.headers.get("Content-Type") == sent
    assert response.headers["Server"] == "minserve"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"Content-Length: 0\r\n\r\n", 200),
        (b"Content-Length: 1001\r\n\r\n", 413),
        (b"Content-Length: 0\r\nx-request-timeout-ms: soon\r\n\r\n", 400),
        (b"Content-Length: 0\r\nExpect: nonsense\r\n\r\n", 417),
        (b"Content-Length: 9\r\n\r\nabc", 400),  # and then the end
        (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
async def test_every_answer_to_a_request_names_server_and_request(rig: Rig, rest: bytes, status: int) -> None:
    async with rig.client() as client:
        client.send(HEAD + rest)
        client.writer.write_eof()
        answer = await client.answer()
        while answer[0] == 100:
            answer = await client.answer()
    assert answer[0] == status
    assert b"\r\nServer: minserve\r\n" in answer[1]
    assert answer[1].lower().count(b"\r\nx-request-id: ") == 1
    if not rest.endswith(b"zz\r\n") and not rest.endswith(b"abc"):  # there it may be no request of its own
        assert b"\r\nx-request-id: mine\r\n" in answer[1].replace(b"X-Request-ID", b"x-request-id")


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/predictions/m", "/ping", "/predictions/none", "/nowhere"])
async def test_no_answer_may_be_kept(rig: Rig, path: str) -> None:
    async with rig.inference.get(path) as response:
        assert [response.headers[name] for name in ("Pragma", "Cache-Control", "Expires", "Connection")] == [
            "no-cache",
            "no-cache; no-store, must-revalidate, private",
            "Thu, 01 Jan 1970 00:00:00 UTC",
            "keep-alive",
        ]


@pytest.mark.asyncio
async def test_a_handler_may_allow_it(rig: Rig) -> None:
    pairs = (("cache-control", "max-age=60"),)
    rig.lane.handle = lambda request: request.answer(Answer(0, 2, 200, "", pairs), b"ok")
    async with rig.inference.get("/predictions/m") as response:
        assert response.headers.getall("Cache-Control") == ["max-age=60"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("version", "asked", "told"),
    [(b"1.1", b"close", b"close"), (b"1.0", b"keep-alive", b"keep-alive"), (b"1.0", b"close", None)],
)
async def test_what_becomes_of_the_connection_is_told_once(
    rig: Rig, version: bytes, asked: bytes, told: bytes | None
) -> None:
    async with rig.client() as client:
        client.send(b"GET /ping HTTP/%s\r\nHost: x\r\nConnection: %s\r\n\r\n" % (version, asked))
        _, head, _ = await client.answer()
    lines = [line.partition(b": ")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"connection:")]
    assert lines == ([] if told is None else [told])
