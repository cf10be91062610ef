import asyncio
import dataclasses
import json
import uuid
from collections.abc import Callable

import pytest

from minserve.dispatch.request import Request
from minserve.errors import WorkerFailed
from minserve.registry.models import ValidModel
from minserve.wire.messages import Answer
from tests.unit.frontend.rig import Lane, Rig, with_options
from tests.unit.worker.specs import make_spec, until

pytestmark = pytest.mark.asyncio

REQUEST_ID = "x-request-id"


def answering(
    status: int = 200, body: bytes = b"ok", headers: tuple[tuple[str, str], ...] = ()
) -> Callable[[Request], None]:
    def handle(request: Request) -> None:
        request.answer(Answer(0, len(body), status, "", headers), memoryview(bytearray(body)))

    return handle


@pytest.mark.parametrize("method", ["POST", "GET", "PUT", "DELETE", "PATCH"])
async def test_every_method_predicts(rig: Rig, method: str) -> None:
    async with rig.inference.request(method, "/predictions/m", data=b"abc") as response:
        assert (response.status, await response.read()) == (200, b"abc")


@pytest.mark.parametrize(
    ("path", "url_path"),
    [
        ("/predictions/m", ""),
        ("/predictions/m/1.0", ""),
        ("/predictions/m/1.0/", ""),
        ("/predictions/m/1.0/v1/chat", "v1/chat"),
    ],
)
async def test_a_path_names_model_version_and_what_the_handler_gets_of_it(rig: Rig, path: str, url_path: str) -> None:
    async with rig.inference.post(path, data=b"") as response:
        assert response.status == 200
    assert rig.lane.requests[-1].meta.url_path == url_path


async def test_the_clients_headers_reach_the_handler_as_they_came(rig: Rig) -> None:
    async with rig.inference.post("/predictions/m", data=b"", headers={"X-Custom": "Ünï"}) as response:
        assert response.status == 200
    assert (b"X-Custom", "Ünï".encode()) in rig.lane.requests[-1].meta.headers


# ── the answer ──


async def test_status_reason_and_headers_are_the_handlers(rig: Rig) -> None:
    def handle(request: Request) -> None:
        pairs = (("Content-Type", "text/x-poem"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"))
        request.answer(Answer(0, 2, 418, "I'm a teapot", pairs), b"ok")

    rig.lane.handle = handle
    async with rig.inference.post("/predictions/m", data=b"") as response:
        assert (response.status, response.reason) == (418, "I'm a teapot")
        assert response.headers.getall("Content-Type") == ["text/x-poem"]
        assert response.headers.getall("Set-Cookie") == ["a=1", "b=2"]
        assert await response.read() == b"ok"


@pytest.mark.parametrize("body", [b"", b"ok"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_no_content_type_is_sent_when_the_handler_sets_none(
    rig: Rig, body: bytes, kind: type[bytes | bytearray | memoryview]
) -> None:
    rig.lane.handle = lambda request: request.answer(Answer(0, len(body)), kind(body))
    status, head, rest = await rig.raw(b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (status, rest) == (200, body)
    names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:]]
    assert b"content-type" not in names
    assert f"content-length: {len(body)}".encode() in head.lower()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Content-Length", "3"),
        ("content-length", "100"),
        ("Transfer-Encoding", "chunked"),
        ("Connection", "keep-alive"),
    ],
)
async def test_a_handlers_header_cannot_break_the_framing_of_its_answer(rig: Rig, name: str, value: str) -> None:
    """Or the next answer on the connection would be read from the middle of this one."""
    rig.lane.handle = answering(body=b"12345", headers=((name, value),))
    one = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
    status, head, rest = await rig.raw(one + b"\r\n" + one + b"Connection: close\r\n\r\n")
    assert status == 200
    assert head.lower().count(b"content-length: 5") == 1
    assert b"transfer-encoding" not in head.lower()
    assert rest.startswith(b"12345HTTP/1.1 200")
    assert rest.endswith(b"\r\n\r\n12345")


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_must_have_no_body_has_none(rig: Rig, status: int) -> None:
    rig.lane.handle = answering(status, body=b"12345")
    one = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
    first, _, rest = await rig.raw(one + b"\r\n" + one + b"Connection: close\r\n\r\n")
    assert first == status
    assert rest.startswith(b"HTTP/1.1 %d" % status)


async def test_the_server_names_itself_without_a_version(rig: Rig) -> None:
    async with rig.inference.post("/predictions/m", data=b"") as response:
        assert response.headers["Server"] == "minserve"


# ── x-request-id ──


@pytest.mark.parametrize("path", ["/predictions/m", "/predictions/none", "/nowhere", "/ping"])
@pytest.mark.parametrize("given", ["a", "A-Za_z.0-9", "x" * 128])
async def test_a_clients_request_id_is_kept_on_every_answer(rig: Rig, path: str, given: str) -> None:
    async with rig.inference.get(path, headers={REQUEST_ID: given}) as response:
        assert response.headers.getall(REQUEST_ID) == [given]


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "a\tb", "ä", "a/b", 'a"b'])
async def test_a_request_id_unfit_for_a_log_is_replaced_by_a_fresh_one(rig: Rig, given: str | None) -> None:
    ids = set()
    for _ in range(2):
        headers = {} if given is None else {REQUEST_ID: given}
        async with rig.inference.post("/predictions/m", data=b"", headers=headers) as response:
            (fresh,) = response.headers.getall(REQUEST_ID)
        assert str(uuid.UUID(fresh)) == fresh
        assert rig.lane.requests[-1].meta.id == fresh, "the handler sees the same"
        ids.add(fresh)
    assert len(ids) == 2


async def test_a_handler_cannot_change_the_request_id(rig: Rig) -> None:
    rig.lane.handle = answering(headers=(("X-Request-Id", "forged"),))
    async with rig.inference.post("/predictions/m", data=b"", headers={REQUEST_ID: "mine"}) as response:
        assert response.headers.getall(REQUEST_ID) == ["mine"]


# ── errors ──


@pytest.mark.parametrize(
    ("path", "type_name", "message"),
    [
        ("/predictions/none", "ModelNotFoundException", "Model not found: none"),
        (
            "/predictions/m/2.0",
            "ModelVersionNotFoundException",
            "Model version: 2.0 does not exist for model: m",
        ),
        (
            "/predictions",
            "ResourceNotFoundException",
            "Requested resource is not found, please refer to API document.",
        ),
    ],
)
async def test_what_is_not_there_is_a_404_in_torchserves_json(
    rig: Rig, path: str, type_name: str, message: str
) -> None:
    async with rig.inference.post(path, data=b"") as response:
        assert (response.status, response.content_type) == (404, "application/json")
        text = await response.text()
    assert text == f'{{\n  "code": 404,\n  "type": "{type_name}",\n  "message": "{message}"\n}}\n'


async def test_a_failed_worker_is_a_retryable_503_with_its_cause(rig: Rig) -> None:
    def handle(request: Request) -> None:
        request.fail(WorkerFailed("m/0: rank 1 (pid 7) was killed by SIGKILL", ("secret path",)))

    rig.lane.handle = handle
    async with rig.inference.post("/predictions/m", data=b"") as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        answer = json.loads(await response.text())
    assert answer == {
        "code": 503,
        "type": "InternalServerException",
        "message": "m/0: rank 1 (pid 7) was killed by SIGKILL",
    }


async def test_a_full_queue_is_a_503_at_the_door(rig: Rig) -> None:
    dispatcher = rig.add("slow", queue_limit=1)
    waiting = asyncio.create_task(rig.inference.post("/predictions/slow", data=b""))
    await until(lambda: dispatcher.queued == 1)
    async with rig.inference.post("/predictions/slow", data=b"") as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        answer = json.loads(await response.text())
    assert answer["type"] == "ServiceUnavailableException"
    assert answer["message"].startswith(
        'Model "slow" has no worker to serve inference request. Please use scale workers'
    )
    assert answer["message"].endswith(": 1 requests wait already, jobQueueSize allows no more")
    dispatcher.attach(rig.lane)
    async with await waiting as response:
        assert response.status == 200


async def test_a_request_past_its_deadline_is_a_504(rig: Rig) -> None:
    spec = rig.registry.find("m").spec
    config = spec.config.model_copy(update={"client_timeout_in_mills": 20})
    rig.add("hasty", config=config)
    async with rig.inference.post("/predictions/hasty", data=b"") as response:
        assert response.status == 504
        assert json.loads(await response.text())["type"] == "RequestTimeoutException"
        assert "Retry-After" not in response.headers


# ── a client that leaves ──


async def test_a_client_that_leaves_is_taken_out_of_the_queue(rig: Rig) -> None:
    dispatcher = rig.add("slow")
    request = asyncio.create_task(rig.inference.post("/predictions/slow", data=b""))
    await until(lambda: dispatcher.queued == 1)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await until(lambda: dispatcher.queued == 0)
    assert dispatcher._live == set()


async def test_a_client_that_leaves_in_flight_gets_no_answer_and_disturbs_nobody(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    held: list[Request] = []
    rig.lane.handle = held.append
    request = asyncio.create_task(rig.inference.post("/predictions/m", data=b""))
    await until(lambda: held)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    dispatcher = rig.registry.find("m").dispatcher
    await until(lambda: dispatcher._live == set())
    held[0].answer(Answer(0, 2), b"ok")
    assert caplog.records == []


# ── what TorchServe's clients rely on ──


async def test_without_a_phrase_of_the_handlers_there_is_none(rig: Rig) -> None:
    rig.lane.handle = answering(404)
    _, head, _ = await rig.raw(b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 \r\n")


@pytest.mark.parametrize(
    ("path", "url_path"),
    [("/explanations/m", ""), ("/explanations/m/1.0", ""), ("/explanations/m/1.0/why/not", "why/not")],
)
async def test_an_explanation_is_asked_for_as_a_prediction_is(rig: Rig, path: str, url_path: str) -> None:
    async with rig.inference.post(path, data=b"abc") as response:
        assert (response.status, await response.read()) == (200, b"abc")
    meta = rig.lane.requests[-1].meta
    assert (meta.operation, meta.url_path) == ("explain", url_path)


async def test_a_request_says_whether_it_names_a_version(rig: Rig) -> None:
    for path, named in (("/predictions/m", False), ("/predictions/m/1.0", True)):
        async with rig.inference.post(path, data=b"") as response:
            assert response.status == 200
        assert rig.lane.requests[-1].named is named


@with_options(max_response_size=4)
async def test_too_large_an_answer_is_a_500_and_the_next_one_is_good(rig: Rig) -> None:
    for body, status in ((b"12345", 500), (b"1234", 200)):
        rig.lane.handle = answering(body=body)
        async with rig.inference.post("/predictions/m", data=b"") as response:
            assert response.status == status
            text = await response.text()
        if status == 500:
            message = 'Model "m": the answer has 5 bytes, max_response_size allows 4'
            assert json.loads(text) == {"code": 500, "type": "InternalServerException", "message": message}


@pytest.mark.parametrize(("path", "status"), [("m", 200), ("m/1.0", 404)])
async def test_a_request_whose_version_goes_while_its_body_comes_is_the_next_ones(
    rig: Rig, path: str, status: int
) -> None:
    async with rig.client() as client:
        client.send(f"POST /predictions/{path} HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\na".encode())
        await until(lambda: rig.in_flight.used)
        rig.registry.add(ValidModel(dataclasses.replace(make_spec(name="m"), version="2.0"), 1, ()))
        lane = Lane()
        rig.registry.find("m", "2.0").dispatcher.attach(lane)
        rig.registry.set_default("m", "2.0")
        await rig.registry.unregister("m", "1.0")
        client.send(b"b")
        answered, _, body = await client.answer()
    assert answered == status
    assert (body == b"ab") == (len(lane.requests) == 1) == (status == 200)
