import json

import pytest

from minserve.frontend.body import MAX_FIELDS, printable
from tests.unit.frontend.rig import MAX_BODY, Rig

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
        ("text/plain; charset=utf-8", "ä".encode(), [("body", "text/plain; charset=utf-8", "ä".encode())]),
        ("image/png", b"\x89PNG", [("body", "image/png", b"\x89PNG")]),
        ("application/json", b"{not json", [("body", "application/json", b"{not json")]),  # the rank decodes
        (None, b"", [("body", "", b"")]),
        (FORM, b"a=1&b=x+y%20z&c=", [("a", "", b"1"), ("b", "", b"x y z"), ("c", "", b"")]),
        (FORM, b"a=%FF%00&%C3%A4=%C3%A4", [("a", "", b"\xff\x00"), ("ä", "", "ä".encode())]),
        (FORM, b"a=1&b=2&a=3", [("a", "", b"3"), ("b", "", b"2")]),
        (FORM, b"", []),
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
        (FORM, b"&".join(b"a%d=" % n for n in range(MAX_FIELDS + 1))[: MAX_BODY * 100], "bad url-encoded body"),
    ],
)
async def test_a_form_that_does_not_parse_is_a_400(
    rig: Rig, content_type: str, body: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig.inference.app, "_client_max_size", 10**6)
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


async def test_a_field_name_without_end_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names travel in a frame's meta, where sixteen long ones of a batch would end the worker."""
    monkeypatch.setattr("minserve.frontend.body.MAX_NAME", 100)
    name = "n" * 101
    for content_type, body in ((FORM, f"{name}=1".encode()), (MULTIPART, multipart((named(name), b"1")))):
        async with rig.inference.post("/predictions/m", data=body, headers={"Content-Type": content_type}) as response:
            assert response.status == 400
            assert "101 characters, at most 100" in await response.text()
