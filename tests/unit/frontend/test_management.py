import json
import os

import pytest

from minserve.errors import ConfigError, HandlerError, NoWorkers, WorkerFailed
from minserve.wire.messages import Answer
from minserve.worker.reports import RankReport, WorkerReport
from minserve.worker.states import State
from tests.unit.frontend.rig import Rig
from tests.unit.worker.specs import model_config

pytestmark = pytest.mark.asyncio

ME = os.getpid()
GONE = 2**22 + 1  # above the largest pid


def report(
    number: int = 0,
    state: State = State.READY,
    devices: str | None = None,
    pids: tuple[int, ...] = (ME,),
    error: str = "",
) -> WorkerReport:
    ranks = tuple(RankReport(rank, pid, f"unix:/run/worker.{rank}", "loaded") for rank, pid in enumerate(pids))
    return WorkerReport(
        *(number, state, 1700000000.0421, 2, devices, 4711, ranks),
        last_error=error,
        last_error_at=1700000001.5 if error else 0.0,
        last_lines=("boom",) if error else (),
    )


async def get(rig: Rig, path: str) -> object:
    async with rig.management.get(path) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "application/json"
        return json.loads(await response.text())


async def describe(rig: Rig, path: str = "/models/m") -> dict[str, object]:
    answer = await get(rig, path)
    assert isinstance(answer, list)
    (version,) = answer
    assert isinstance(version, dict)
    return version


async def workers_of(rig: Rig) -> list[dict[str, object]]:
    workers = (await describe(rig))["workers"]
    assert isinstance(workers, list)
    return workers


# ── /models ──


@pytest.mark.parametrize(
    ("query", "names", "token"),
    [
        ("", "a b c m", None),
        ("?limit=2", "a b", "2"),
        ("?limit=2&next_page_token=2", "c m", "4"),  # as TorchServe, which looks no further
        ("?limit=2&next_page_token=4", "", None),
        ("?limit=3&next_page_token=3", "m", None),
        ("?limit=4", "a b c m", "4"),
        ("?next_page_token=9", "", None),
        ("?limit=1000", "a b c m", None),
        ("?limit=-1&next_page_token=-5", "a b c m", None),
        ("?limit=many&next_page_token=first", "a b c m", None),
    ],
)
async def test_models_are_listed_by_name_a_page_at_a_time(rig: Rig, query: str, names: str, token: str | None) -> None:
    for name in "cab":
        rig.add(name)
    answer = await get(rig, f"/models{query}")
    models = [{"modelName": name, "modelUrl": f"/models/{name}"} for name in names.split()]
    assert answer == ({"models": models} if token is None else {"nextPageToken": token, "models": models})


async def test_a_page_has_100_models_at_most(rig: Rig) -> None:
    for number in range(105):
        rig.add(f"a{number:03}")
    first = await get(rig, "/models?limit=101")
    assert isinstance(first, dict)
    second = await get(rig, f"/models?next_page_token={first['nextPageToken']}")
    assert isinstance(second, dict)
    assert (len(first["models"]), len(second["models"])) == (100, 6)


# ── /models/{model} ──


@pytest.mark.parametrize("path", ["/models/m", "/models/m/1.0", "/models/m/all"])
async def test_a_model_is_described_as_torchserve_does_with_our_fields_added(rig: Rig, path: str) -> None:
    rig.supervisor().reports = [report()]
    description = await describe(rig, path)
    workers = description.pop("workers")
    assert isinstance(workers, list)
    assert description == {
        "modelName": "m",
        "modelVersion": "1.0",
        "modelUrl": "/models/m",
        "runtime": "python",
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 1,
        "maxBatchDelay": 100,
        "responseTimeout": 10,
        "startupTimeout": 20,
        "maxRetryTimeoutInSec": 300,
        "clientTimeoutInMills": 0,
        "parallelType": "",
        "parallelLevel": 0,
        "deviceType": "cpu",
        "continuousBatching": False,
        "useJobTicket": False,
        "useVenv": False,
        "stateful": False,
        "sequenceMaxIdleMSec": 0,
        "sequenceTimeoutMSec": 0,
        "maxNumSequence": 0,
        "maxSequenceJobQueueSize": 0,
        "loadedAtStartup": True,
        "jobQueueStatus": {"remainingCapacity": 100, "pendingRequests": 0},
        "ready": True,
    }
    (worker,) = workers
    memory = worker.pop("memoryUsage")
    assert memory > 10**6
    assert worker == {
        "id": "0",
        "startTime": "2023-11-14T22:13:20.042Z",
        "status": "READY",
        "pid": 4711,
        "gpu": False,
        "gpuUsage": "N/A",
        "state": "READY",
        "restarts": 2,
        "ranks": [{"rank": 0, "pid": ME, "endpoint": "unix:/run/worker.0", "progress": "loaded"}],
    }


@pytest.mark.parametrize("state", State)
async def test_status_is_torchserves_and_state_is_ours(rig: Rig, state: State) -> None:
    rig.supervisor().reports = [report(state=state)]
    serving = state in (State.READY, State.BUSY)
    (worker,) = await workers_of(rig)
    assert (worker["status"], worker["state"]) == ("READY" if serving else "UNLOADING", state.value)
    assert (await describe(rig))["ready"] == serving


async def test_one_ready_worker_makes_a_model_ready(rig: Rig) -> None:
    rig.supervisor().reports = [report(0, State.LOADING), report(1, State.BUSY)]
    assert (await describe(rig))["ready"] is True
    assert [worker["id"] for worker in await workers_of(rig)] == ["0", "1"]


async def test_a_failed_worker_shows_its_last_error_and_the_last_lines(rig: Rig) -> None:
    rig.supervisor().reports = [report(state=State.FAILED, error="m/0: rank 1 died", pids=())]
    (worker,) = await workers_of(rig)
    assert worker["lastError"] == "m/0: rank 1 died"
    assert worker["lastErrorTime"] == "2023-11-14T22:13:21.500Z"
    assert worker["lastLines"] == ["boom"]
    assert worker["ranks"] == []


async def test_a_rank_that_has_just_died_counts_for_no_memory(rig: Rig) -> None:
    rig.supervisor().reports = [report(pids=(GONE,)), report(pids=(0,))]
    assert [worker["memoryUsage"] for worker in await workers_of(rig)] == [0, 0]


async def test_a_model_that_has_given_up_says_why(rig: Rig) -> None:
    rig.supervisor().unhealthy = WorkerFailed("m/0: rank 1 cannot load")
    assert (await describe(rig))["unhealthy"] == "m/0: rank 1 cannot load"


async def test_devices_and_parallelism_are_shown(rig: Rig) -> None:
    config = model_config("tp", device_ids=(2, 3), max_workers=3, min_workers=1)
    rig.add("big", config=config, world_size=2, response_timeout=2.5)
    rig.supervisor("big").reports = [report(devices="2,3")]
    description = await describe(rig, "/models/big")
    shown = ("parallelType", "parallelLevel", "deviceType", "deviceIds", "maxWorkers", "responseTimeout")
    assert [description[key] for key in shown] == ["tp", 2, "gpu", [2, 3], 3, 2.5]
    assert isinstance(description["workers"], list)
    assert description["workers"][0]["gpuUsage"] == "devices: 2,3"


@pytest.mark.parametrize(("kind", "level"), [("", 0), ("custom", 2)])
async def test_a_level_counts_with_a_type_alone(rig: Rig, kind: str, level: int) -> None:
    rig.add("big", config=model_config(kind, parallel_level=2))
    assert (await describe(rig, "/models/big"))["parallelLevel"] == level


async def test_the_queue_is_counted(rig: Rig) -> None:
    import asyncio

    dispatcher = rig.add("slow", queue_limit=5)
    request = asyncio.create_task(rig.inference.post("/predictions/slow", data=b""))
    while not dispatcher.queued:  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0)
    description = await describe(rig, "/models/slow")
    assert description["jobQueueStatus"] == {"remainingCapacity": 4, "pendingRequests": 1}
    dispatcher.attach(rig.lane)
    (await request).close()


async def test_a_model_with_a_wrong_configuration_shows_what_is_wrong(rig: Rig) -> None:
    rig.registry.broken = {"bad": ConfigError("model-config.yaml:3: batchSize: found true")}
    for path in ("/models/bad", "/models/bad/all"):
        assert await describe(rig, path) == {
            "modelName": "bad",
            "lastError": "model-config.yaml:3: batchSize: found true",
            "workers": [],
        }


async def test_what_cannot_be_read_is_listed_among_the_others(rig: Rig) -> None:
    rig.add("z", url="z.mar")
    rig.registry.broken = {"n": ConfigError("junk"), "m": ConfigError("the first version is good")}
    answer = await get(rig, "/models")
    assert answer == {
        "models": [
            {"modelName": "m", "modelUrl": "/models/m"},
            {"modelName": "n", "modelUrl": ""},
            {"modelName": "z", "modelUrl": "z.mar"},
        ]
    }


async def test_a_models_registration_is_shown(rig: Rig) -> None:
    config = model_config(sequence_batching=True, max_num_sequence=3)
    rig.add("r", config=config, url="r.tar.gz", runtime="python3")
    description = await describe(rig, "/models/r")
    keys = ("modelUrl", "runtime", "stateful", "maxNumSequence", "maxSequenceJobQueueSize")
    assert [description[key] for key in keys] == ["r.tar.gz", "python3", True, 3, 1]


# ── customized ──


@pytest.mark.parametrize(
    ("body", "metadata"),
    [(b'{"input": [1, null]}', {"input": [1, None]}), (b"[1]", {}), (b"no JSON", {}), (b"", {}), (b"\xff", {})],
)
async def test_a_model_is_asked_what_it_says_of_itself(rig: Rig, body: bytes, metadata: object) -> None:
    rig.lane.handle = lambda request: request.answer(Answer(0, len(body)), memoryview(body))
    headers = {"Authorization": "Bearer key", "X-Own": "1"}
    async with rig.management.get("/models/m/1.0?customized=TRUE", headers=headers) as response:
        assert (response.status, response.reason) == (200, "")
        (description,) = json.loads(await response.text())
    assert description["customizedMetadata"] == metadata
    keys = list(description)
    assert keys.index("customizedMetadata") == keys.index("jobQueueStatus") + 1 == keys.index("ready") - 1
    meta = rig.lane.requests[-1].meta
    assert (meta.operation, meta.parts, meta.id) == ("describe", (), response.headers["x-request-id"])
    assert (b"X-Own", b"1") in meta.headers
    assert b"key" not in b"".join(value for _, value in meta.headers), "it opens the management port"


@pytest.mark.parametrize("path", ["/models/m", "/models/m/all?customized=true", "/models/m?customized=1"])
async def test_nobody_asks_a_model_otherwise(rig: Rig, path: str) -> None:
    assert "customizedMetadata" not in await describe(rig, path)
    assert rig.lane.requests == []


async def test_a_model_without_workers_cannot_be_asked(rig: Rig) -> None:
    rig.registry.find("m").dispatcher.refuse(NoWorkers("m"))
    async with rig.management.get("/models/m?customized=true") as response:
        assert response.status == 503
        assert json.loads(await response.text()) == {
            "code": 503,
            "type": "ServiceUnavailableException",
            "message": 'Model "m" has no worker to serve describe request. '
            "Please use scale workers API to add workers.",
        }


async def test_a_handler_that_fails_to_describe_itself_says_why(rig: Rig) -> None:
    rig.lane.handle = lambda request: request.fail(HandlerError("KeyError: 'a'"))
    async with rig.management.get("/models/m?customized=true") as response:
        assert (response.status, json.loads(await response.text())["message"]) == (503, "KeyError: 'a'")
