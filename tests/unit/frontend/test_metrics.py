import asyncio
import math
import re

import pytest

from minserve.dispatch.request import Request
from minserve.errors import HandlerError
from minserve.frontend.app import metrics_app
from minserve.telemetry.declarations import DEFAULT, OWN_REQUEST_SECONDS
from minserve.telemetry.events import EventKind
from minserve.telemetry.metrics import Metrics, Mode
from minserve.wire.arena import BLOCK_BYTES
from minserve.wire.messages import RequestMeta
from minserve.worker.reports import WorkerReport
from minserve.worker.states import State
from tests.unit.frontend.rig import OPTIONS, Client, Rig, Server

pytestmark = pytest.mark.asyncio


async def get(rig: Rig, query: str = "", method: str = "GET") -> str:
    async with Client(Server(metrics_app(rig.registry, OPTIONS))) as client:
        answer = await client.request(method, f"/metrics{query}")
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return await answer.text()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Values by name and the labels' values."""
    found = re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE)  # prometheus-client's parser changes names
    return {(name, *re.findall(r'"(.*?)"', labels)): float(value) for name, labels, value in found}


async def test_every_metric_that_there_may_be_has_its_head(rig: Rig) -> None:
    heads = [line.split()[2] for line in (await get(rig)).splitlines() if line.startswith("# TYPE")]
    own = [
        "request_seconds",
        "queue_requests",
        "workers",
        "worker_restarts_total",
        "shared_memory_bytes",
        "in_flight_bytes",
    ]
    assert heads == [
        *(one.name for one in (*DEFAULT.server, *DEFAULT.model)),
        *(f"minserve_{name}" for name in own),
    ]


async def test_answers_of_all_ports_are_counted_also_those_to_what_is_no_request(rig: Rig) -> None:
    host = rig.registry.metrics.hostname
    assert (await rig.inference.post("/predictions/m", data=b"x")).status == 200
    assert (await rig.management.get("/ping")).status == 200
    assert (await rig.inference.get("/nothing")).status == 404
    assert (await rig.raw(b"nonsense\r\n\r\n"))[0] == 400
    found = samples(await get(rig))
    assert found["Requests2XX", "Host", host] == 2
    assert found["Requests4XX", "Host", host] == 2
    assert found["ts_inference_requests_total", "m", "default", host] == 1


async def test_a_refused_connection_is_an_answer_too(rig: Rig) -> None:
    rig.connections.options = rig.connections.options.model_copy(update={"max_connections": 0})
    assert (await rig.raw(b"GET / HTTP/1.1\r\n\r\n"))[0] == 503
    found = samples(await get(rig))
    assert found["Requests5XX", "Host", rig.registry.metrics.hostname] == 1


async def test_a_request_counts_whatever_becomes_of_it_and_by_the_version_that_it_names(rig: Rig) -> None:
    def fail(request: Request) -> None:
        request.fail(HandlerError("no"))

    rig.lane.handle = fail
    for path in ("/predictions/m", "/predictions/m/1.0", "/explanations/m"):
        assert (await rig.inference.post(path, data=b"x")).status == 503
    assert (await rig.inference.post("/predictions/other", data=b"x")).status == 404
    host = rig.registry.metrics.hostname
    found = samples(await get(rig, "?name[]=ts_inference_requests_total"))
    assert found == {
        ("ts_inference_requests_total", "m", "default", host): 2,
        ("ts_inference_requests_total", "m", "1.0", host): 1,
    }


async def test_names_choose_samples_of_torchserves_and_of_ours(rig: Rig) -> None:
    await rig.inference.post("/predictions/m", data=b"x")
    text = await get(rig, "?name[]=Requests2XX&name[]=minserve_request_seconds_count&name[]=no_such", "POST")
    names = [key[0] for key in samples(text)]
    assert names == ["Requests2XX"] + 5 * ["minserve_request_seconds_count"]
    assert [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")] == [
        "Requests2XX",
        OWN_REQUEST_SECONDS.name,
    ]


async def test_our_own_say_what_is_going_on_now(rig: Rig) -> None:
    model = rig.registry.find("m")
    rig.supervisor().reports = [
        WorkerReport(number, state, 0.0, 1, None, 0, (), "", 0.0, (), answers_held=4)
        for number, state in enumerate((State.READY, State.BUSY, State.BUSY))
    ]
    model.events.record(EventKind.RESTART, "restart in 1 s", 0)
    model.events.record(EventKind.RESTART, "restart in 1 s", 0)
    model.dispatcher.meters.rank0.record(0.3)
    model.dispatcher.detach(rig.lane)
    request = Request(RequestMeta("id", (), ()), [], math.inf, asyncio.get_running_loop().create_future())
    waiting = asyncio.create_task(model.dispatcher.submit(request))
    share = rig.in_flight.share()
    share.grow(10)
    assert model.dispatcher.arena is not None
    share.allocate(model.dispatcher.arena, 0, 9)
    found = samples(await get(rig))
    share.give_back()
    model.dispatcher.attach(rig.lane)
    await waiting
    of_workers = {key[3]: value for key, value in found.items() if key[0] == "minserve_workers" and value}
    assert of_workers == {"READY": 1, "BUSY": 2}
    assert found["minserve_worker_restarts_total", "m", "1.0"] == 2
    assert found["minserve_queue_requests", "m", "1.0"] == 1
    assert found["minserve_in_flight_bytes",] == 10
    assert found["minserve_shared_memory_bytes", "answers", "m", "1.0"] == 12
    assert found["minserve_shared_memory_bytes", "requests", "m", "1.0"] == BLOCK_BYTES
    assert found["minserve_request_seconds_bucket", "0.25", "m", "1.0", "rank0"] == 0
    assert found["minserve_request_seconds_bucket", "0.5", "m", "1.0", "rank0"] == 1
    assert found["minserve_request_seconds_sum", "m", "1.0", "rank0"] == 0.3


async def test_each_stage_that_the_frontend_sees_has_its_time(rig: Rig) -> None:
    await rig.inference.post("/predictions/m", data=b"x")
    found = samples(await get(rig))
    counts = {key[3]: value for key, value in found.items() if key[0] == "minserve_request_seconds_count"}
    # The lane is no broadcast, and batches of one wait for nobody.
    assert counts == {"frontend": 1, "batch_wait": 0, "queue": 1, "broadcast": 0, "rank0": 0}
    assert 0 < found["minserve_request_seconds_sum", "m", "1.0", "frontend"] < 10


@pytest.mark.parametrize(("mode", "heads"), [("log", 0), ("legacy", 3)])
async def test_the_other_modes_show_none_of_ours(rig: Rig, mode: Mode, heads: int) -> None:
    rig.registry.metrics = Metrics(mode=mode)
    text = await get(rig)
    assert text.count("# TYPE") == heads
    assert "minserve" not in text
    assert bool(text) == bool(heads)
