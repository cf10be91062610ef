import asyncio
import json

import pytest

from minserve.dispatch.request import Request
from minserve.frontend.body import printable
from minserve.wire.messages import Answer
from tests.unit.frontend.rig import MAX_BODY, Rig, with_options
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio

FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=xyz"


def multipart(*parts: tuple[str, bytes], end: bytes = b"--xyz--\r\n") -> bytes:
    return b"".join(b"--xyz\r\n" + head.encode() + b"\r\n\r\n" + body + b"\r\n" for head, body in parts) + end


def named(name: str, more: str = "") -> str:
    return f'Content-Disposition: form-data; name="{name}"{more}'


@pytest.mark.parametrize(
    ("content_type", "body", "parts"),
    [
        (None, b"\x00\xff", [("body", "", b"\x00\xff")]),
        ("application/json", b'{"a": 1}', [("body", "application/json", b'{"a": 1}')]),
        ("text/plain; charset=utf-8", "ä".encode(), [("body", "text/plain", "ä".encode())]),
        ("image/png", b"\x89PNG", [("body", "image/png", b"\x89PNG")]),
        ("application/json", b"{not json", [("body", "application/json", b"{not json")]),  # the rank decodes
        (None, b"", [("body", "", b"")]),
        (FORM, b"a=1&b=x+y%20z&c=", [("a", "", b"1"), ("b", "", b"x y z"), ("c", "", b"")]),
        (FORM, b"a=%FF%00&%C3%A4=%C3%A4", [("a", "", b"\xff\x00"), ("ä", "", "ä".encode())]),
        (FORM, b"a=1&b=2&a=3", [("a", "", b"3"), ("b", "", b"2")]),
        (FORM, b"", []),
        (FORM, b"b&a=1", [("b", "", b""), ("a", "", b"1")]),
        (FORM, b"a=1&b", [("a", "", b"1")]),  # as TorchServe has it
        (FORM, b'{"a": 1}', []),
        ("Application/X-WWW-Form-Urlencoded; charset=utf-8", b"a=1", [("a", "", b"1")]),
        (FORM + "-x", b"a=1", [("body", FORM + "-x", b"a=1")]),
        (
            MULTIPART,
            multipart(
                (named("image", '; filename="a.png"') + "\r\nContent-Type: image/png", b"\x89PNG\r\n\r\n--xy\r\n"),
                (named("text"), b"plain"),
            ),
            [("image", "image/png", b"\x89PNG\r\n\r\n--xy\r\n"), ("text", "", b"plain")],
        ),
        (MULTIPART, multipart((named("a"), b"1"), (named("a"), b"2")), [("a", "", b"2")]),
        (MULTIPART.replace("multi", "Multi"), multipart((named("a"), b"")), [("a", "", b"")]),
        (MULTIPART, multipart(), []),
    ],
)
async def test_the_parts_of_a_body(
    rig: Rig, content_type: str | None, body: bytes, parts: list[tuple[str, str, bytes]]
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with rig.inference.post(
        "/predictions/m", data=body, headers=headers, skip_auto_headers=["Content-Type"]
    ) as response:
        assert response.status == 200, await response.text()
    assert rig.lane.parts() == parts


async def test_stray_bytes_in_a_header_become_text_that_a_frame_can_carry() -> None:
    assert printable("image/\udcff") == "image/?"  # as aiohttp decodes the byte ff
    assert printable("bild/ä") == "bild/ä"


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        (MULTIPART, multipart((named("a"), b"1"), end=b""), "bad multipart body"),
        (MULTIPART, b"no boundary at all", "bad multipart body"),
        ("multipart/form-data", multipart((named("a"), b"1")), "bad multipart body"),
        (MULTIPART, multipart(("Content-Type: text/plain", b"1")), "a part without a name"),
        (
            MULTIPART,
            multipart((named("a") + "\r\nContent-Type: multipart/mixed; boundary=in", b"--in\r\n\r\nx\r\n--in--")),
            "a multipart inside a multipart",
        ),
        (FORM, b"&".join(b"a%d=" % n for n in range(11)), "bad url-encoded body"),
        (MULTIPART, multipart(*[(named("a"), b"")] * 11), "bad multipart body: more than 10 parts"),
    ],
)
async def test_a_form_that_does_not_parse_is_a_400(
    rig: Rig, content_type: str, body: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minserve.frontend.body.MAX_FIELDS", 10)
    async with rig.inference.post("/predictions/m", data=body, headers={"Content-Type": content_type}) as response:
        assert response.status == 400
        answer = json.loads(await response.text())
    assert (answer["code"], answer["type"]) == (400, "BadRequestException")
    assert message in answer["message"]
    assert rig.lane.requests == []


@pytest.mark.parametrize("content_type", ["application/octet-stream", FORM, MULTIPART])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_a_413_however_it_comes(rig: Rig, content_type: str, chunked: bool) -> None:
    body = b"a=" + b"x" * MAX_BODY
    if content_type == MULTIPART:
        body = multipart((named("a"), b"x" * (MAX_BODY // 2)), (named("b"), b"x" * (MAX_BODY // 2 + 1)))

    async def pieces() -> object:
        yield body[:700]
        yield body[700:]

    async with rig.inference.post(
        "/predictions/m", data=pieces() if chunked else body, headers={"Content-Type": content_type}
    ) as response:
        assert response.status == 413
        assert response.content_type == "application/json"
        answer = json.loads(await response.text())
    assert (answer["code"], answer["type"]) == (413, "RequestEntityTooLargeException")
    assert rig.lane.requests == []


async def test_a_body_at_the_limit_is_taken(rig: Rig) -> None:
    async with rig.inference.post("/predictions/m", data=b"x" * MAX_BODY) as response:
        assert response.status == 200
        assert await response.read() == b"x" * MAX_BODY


async def test_parts_of_one_name_count_against_the_limit_together(rig: Rig) -> None:
    body = multipart(*[(named("a"), b"x" * (MAX_BODY // 4))] * 5)
    async with rig.inference.post("/predictions/m", data=body, headers={"Content-Type": MULTIPART}) as response:
        assert response.status == 413


async def test_a_compressed_body_is_not_blown_up(rig: Rig) -> None:
    async with rig.inference.post("/predictions/m", data=b"\x1f\x8b", headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 200
    assert rig.lane.parts()[0][2] == b"\x1f\x8b"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (FORM, b"n" * 101 + b"=1"),
        (FORM, b"n" * 50 + b"=1&" + b"m" * 51 + b"=1"),
        (MULTIPART, multipart((named("n" * 101), b"1"))),
        (MULTIPART, multipart((named("n") + "\r\nContent-Type: " + "t" * 100, b"1"))),
    ],
)
async def test_names_and_types_without_end_are_refused(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, content_type: str, body: bytes
) -> None:
    """They travel in a frame's meta, where sixteen long ones of a batch would end the worker."""
    monkeypatch.setattr("minserve.frontend.body.MAX_NAMES", 100)
    async with rig.inference.post("/predictions/m", data=body, headers={"Content-Type": content_type}) as response:
        assert response.status == 400
        assert "names and types of 101 characters, at most 100" in await response.text()


# ── a body that takes its time, or breaks off ──

HEAD = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\n"


@with_options(body_timeout=0.05)
@pytest.mark.parametrize(
    ("rest", "have"),
    [
        (b"Content-Length: 10\r\n\r\nabc", "3 of its 10 bytes had arrived"),
        (b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "3 bytes and no end of it had arrived"),
        (b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n", "0 of its 10 bytes had arrived"),
    ],
)
async def test_a_body_that_stops_arriving_is_a_408(rig: Rig, rest: bytes, have: str) -> None:
    async with rig.client() as client:
        client.send(HEAD + rest)
        status, head, body = await client.answer()
        if status == 100:
            status, head, body = await client.answer()
        assert await client.rest() == b""
    assert status == 408
    assert b"Connection: close" in head
    answer = json.loads(body)
    assert (answer["code"], answer["type"]) == (408, "RequestTimeoutException")
    assert answer["message"] == f"the body took longer than body_timeout (0.05 s); {have}"
    assert rig.lane.requests == []


async def test_a_body_that_arrives_behind_the_requests_deadline_is_a_504(rig: Rig) -> None:
    status, head, body = await rig.raw(HEAD + b"x-request-timeout-ms: 50\r\nContent-Length: 10\r\n\r\nabc")
    assert status == 504
    assert b"Connection: close" in head
    answer = json.loads(body)
    assert answer["type"] == "RequestTimeoutException"
    assert answer["message"] == "the request's deadline passed while its body was read; 3 of its 10 bytes had arrived"
    assert rig.lane.requests == []


async def test_a_body_in_many_pieces_is_put_together(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(HEAD + b"Content-Length: 9\r\n\r\n")
        for piece in (b"one", b"two", b"six"):
            await until(lambda: rig.connections.requests_count == 1)
            client.send(piece)
        assert (await client.answer())[::2] == (200, b"onetwosix")


@pytest.mark.parametrize("rest", [b"Content-Length: 10\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"])
async def test_a_body_that_breaks_off_is_a_400(rig: Rig, rest: bytes) -> None:
    async with rig.client() as client:
        client.send(HEAD + rest)
        client.writer.write_eof()
        status, head, body = await client.answer()
        assert await client.rest() == b""
    assert status == 400
    assert b"Connection: close" in head
    assert json.loads(body)["message"] == "the connection ended before the body did"
    assert rig.lane.requests == []


@pytest.mark.parametrize("rest", [b"Content-Length: 10\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"])
async def test_the_end_of_a_server_does_not_wait_for_a_body(rig: Rig, rest: bytes) -> None:
    async with rig.client() as client:
        client.send(b"POST /predictions/m HTTP/1.1\r\nHost: x\r\n" + rest)
        await until(lambda: [one._current_request for one in rig.connections.connections if one._current_request])
        ending = asyncio.create_task(rig.inference.close())
        status, _, body = await client.answer()
        assert status == 503
        assert b"the server is shutting down" in body
        assert await client.rest() == b""
        await ending


async def test_bad_chunks_are_a_400_that_ends_the_connection(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await until(lambda: rig.connections.requests_count == 1)
        client.send(b"zz\r\n" + HEAD + b"Content-Length: 0\r\n\r\n")
        status, head, body = await client.answer()
        assert await client.rest() == b"", "what follows is no request"
    assert status == 400
    assert b"Connection: close" in head
    assert json.loads(body)["message"].startswith("bad request: ")
    assert rig.lane.requests == []


# ── Expect ──


async def test_a_client_that_asks_first_is_told_to_send_its_body(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(HEAD + b"Expect: 100-Continue\r\nContent-Length: 3\r\n\r\n")
        assert await client.answer() == (100, b"HTTP/1.1 100 Continue\r\n\r\n", b"")
        client.send(b"abc")
        assert (await client.answer())[::2] == (200, b"abc")


async def test_the_100_is_no_answer_that_has_begun(rig: Rig, held: list[Request]) -> None:
    """With one that has, a client that ends its direction would count as gone."""
    async with rig.client() as client:
        client.send(HEAD + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        assert (await client.answer())[0] == 100
        client.send(b"abc")
        await until(lambda: held)
        client.writer.write_eof()
        assert (await client.answer())[0] == 100
        held[0].answer(Answer(0, 2), b"ok")
        assert (await client.answer())[::2] == (200, b"ok")


async def test_a_client_that_does_not_wait_for_the_100_gets_none(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(HEAD + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc")
        assert (await client.answer())[::2] == (200, b"abc")


@pytest.mark.parametrize(
    ("path", "more", "status"),
    [
        (b"/predictions/m", b"Content-Length: 1001\r\n", 413),
        (b"/predictions/none", b"Content-Length: 3\r\n", 404),
        (b"/nowhere", b"Content-Length: 3\r\n", 404),
        (b"/predictions/m", b"Content-Length: 3\r\nx-request-timeout-ms: soon\r\n", 400),
        (b"/predictions/m", b"Content-Length: 3\r\nExpect: nonsense\r\n", 417),
    ],
)
async def test_a_client_that_asks_first_and_is_refused_need_not_send_its_body(
    rig: Rig, path: bytes, more: bytes, status: int
) -> None:
    """And is told that the connection ends: nobody could tell a next request from the body that did not come."""
    head = HEAD.replace(b"/predictions/m", path)
    async with rig.client() as client:
        client.send(head + more + (b"" if b"Expect" in more else b"Expect: 100-continue\r\n") + b"\r\n")
        answer = await client.answer()
        assert answer[0] == status
        assert b"Connection: close" in answer[1]
    assert rig.lane.requests == []


async def test_http_1_0_knows_no_100(rig: Rig) -> None:
    async with rig.client() as client:
        client.send(HEAD.replace(b"1.1", b"1.0") + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        await until(lambda: rig.connections.requests_count == 1)
        client.send(b"abc")
        assert (await client.answer())[::2] == (200, b"abc")
