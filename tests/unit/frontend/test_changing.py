import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from minserve.config.server import ServerOptions
from minserve.errors import ConfigError, NoWorkers, WorkerFailed, WorkerOutOfMemory
from minserve.registry.models import ServedModel
from tests.unit.frontend.rig import OPTIONS, FakeSupervisor, Rig
from tests.unit.worker.specs import until

FAILED = "m/0: rank 0 cannot load: no weights"
Plan = Callable[[FakeSupervisor], None]


class Changes:
    """Calls of the management port."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        """Status, and what `status` or the error's `message` says."""
        async with self.rig.management.request(method, path, json=body) as response:
            answer = json.loads(await response.text())
            assert response.content_type == "application/json"
            if response.status >= 400:
                assert answer["code"] == response.status
                return response.status, f"{answer['type']}: {answer['message']}"
            assert answer.keys() == {"status"}
            return response.status, answer["status"]

    def served(self, name: str = "a", version: str | None = None) -> ServedModel:
        return self.rig.registry.find(name, version)


@pytest.fixture
def plan() -> list[Plan]:
    """What happens to each supervisor that is made from now on."""
    return []


@pytest.fixture
def options(tmp_path: Path) -> ServerOptions:
    return OPTIONS.model_copy(update={"enable_model_api": True, "model_store": str(tmp_path)})


@pytest.fixture
def changes(rig: Rig, options: ServerOptions, plan: list[Plan], monkeypatch: pytest.MonkeyPatch) -> Changes:
    """Of a store with two versions of model a."""

    def make(*args: object) -> FakeSupervisor:
        supervisor = FakeSupervisor(*args)  # type: ignore[arg-type]
        for change in plan:
            change(supervisor)
        return supervisor

    monkeypatch.setattr("minserve.registry.making.Supervisor", make)
    for folder, version in (("a", "1.0"), ("a2", "2.0")):
        model = Path(options.model_store, folder)
        Path(model, "MAR-INF").mkdir(parents=True)
        manifest = {"runtime": "python", "model": {"modelName": "a", "modelVersion": version, "handler": "handler.py"}}
        Path(model, "MAR-INF", "MANIFEST.json").write_text(json.dumps(manifest))
        Path(model, "handler.py").touch()
    return Changes(rig)


pytestmark = pytest.mark.asyncio


def failing(error: Exception) -> Plan:
    return lambda supervisor: setattr(supervisor, "starting", error)


# ── register ──


async def test_a_model_is_registered_without_workers_unless_asked_for(changes: Changes) -> None:
    assert await changes.call("POST", "/models?url=a") == (
        200,
        'Model "a" Version: 1.0 registered with 0 initial workers. Use scale workers API to add workers for the model.',
    )
    assert not changes.served().loaded_at_startup


async def test_a_call_that_waits_is_answered_when_the_workers_are_up(changes: Changes, plan: list[Plan]) -> None:
    up = asyncio.Event()
    plan.append(lambda supervisor: setattr(supervisor, "starting", up))
    call = asyncio.create_task(changes.call("POST", "/models?url=a&initial_workers=2"))
    await until(lambda: changes.rig.registry.versions("a"))
    status, answer = await changes.call("PUT", "/models/m?min_worker=1")  # nothing else waits for it
    assert (status, answer) == (202, "Processing worker updates...")
    assert not call.done()
    up.set()
    assert await call == (200, 'Model "a" Version: 1.0 registered with 2 initial workers')


async def test_a_call_that_does_not_wait_is_answered_at_once(changes: Changes, plan: list[Plan]) -> None:
    plan.append(lambda supervisor: setattr(supervisor, "starting", asyncio.Event()))
    answer = await changes.call("POST", "/models?url=a&initial_workers=1&synchronous=False")
    assert answer == (202, "Processing worker updates...")


async def test_workers_that_are_late_are_a_206(
    changes: Changes, plan: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minserve.frontend.changing.LATE_S", 0.0)
    plan.append(lambda supervisor: setattr(supervisor, "starting", asyncio.Event()))
    answer = await changes.call("POST", "/models?url=a&initial_workers=1&startup_timeout=0.01")
    assert answer == (206, "Workers scaling in progress...")
    assert changes.served().spec.version == "1.0"


@pytest.mark.parametrize(
    ("error", "status"), [(WorkerFailed(FAILED), 500), (WorkerOutOfMemory("m/0: rank 0 was killed"), 507)]
)
async def test_a_model_that_does_not_start_is_unregistered_again(
    changes: Changes, plan: list[Plan], error: WorkerFailed, status: int
) -> None:
    plan.append(failing(error))
    answer = await changes.call("POST", "/models?url=a&initial_workers=1")
    assert answer == (status, f"InternalServerException: Failed to start workers for model a version: 1.0: {error}")
    assert (await changes.call("PUT", "/models/a"))[0] == 404


async def test_a_model_that_nobody_waits_for_stays_also_if_it_does_not_start(
    changes: Changes, plan: list[Plan]
) -> None:
    plan.append(failing(WorkerFailed(FAILED)))
    answer = await changes.call("POST", "/models?url=a&initial_workers=1&synchronous=false")
    assert answer == (202, "Processing worker updates...")
    for _ in range(20):  # whatever waits for its workers has its turns
        await asyncio.sleep(0)
    assert changes.rig.registry.versions("a")


async def test_a_client_that_leaves_undoes_nothing_and_a_failed_start_is_noticed_all_the_same(
    changes: Changes, plan: list[Plan]
) -> None:
    class Held(asyncio.Event):
        async def wait(self) -> bool:  # type: ignore[override]
            await super().wait()
            raise WorkerFailed(FAILED)

    held = Held()
    plan.append(lambda supervisor: setattr(supervisor, "starting", held))
    call = asyncio.create_task(changes.call("POST", "/models?url=a&initial_workers=1"))
    await until(lambda: changes.rig.registry.versions("a"))
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await asyncio.sleep(0)
    assert changes.rig.registry.versions("a")
    held.set()
    await until(lambda: not changes.rig.registry.versions("a"))


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("?url=a&batch_size=3&max_batch_delay=7&response_timeout=33&startup_timeout=44&model_name=b", None),
        (
            "?url=nothing",  # JSON goes before the query
            {
                "url": "a",
                "batch_size": 3,
                "max_batch_delay": "7",
                "response_timeout": 33,
                "startup_timeout": 44.0,
                "model_name": "b",
                "initial_workers": None,
                "s3_sse_kms": False,
            },
        ),
    ],
)
async def test_what_is_asked_for_is_what_is_served(changes: Changes, query: str, body: object) -> None:
    status, _ = await changes.call("POST", f"/models{query}", body)
    assert status == 200
    spec = changes.served("b").spec
    assert (spec.config.batch_size, spec.config.max_batch_delay) == (3, 7)
    assert (spec.response_timeout, spec.startup_timeout, spec.url) == (33, 44, "a")


async def test_numbers_that_are_none_are_not_given(changes: Changes) -> None:
    """TorchServe registers from JSON with a delay of -10000 milliseconds where none is given."""
    for number, query in enumerate(("batch_size=x&max_batch_delay=-100&initial_workers=-1", "batch_size=0")):
        status, text = await changes.call("POST", f"/models?url=a&model_name=n{number}&{query}")
        assert (status, "with 0 initial" in text) == (200, True)
        config = changes.served(f"n{number}").spec.config
        assert (config.batch_size, config.max_batch_delay) == (1, 100)
    assert (await changes.call("POST", "/models", {"url": "a"}))[0] == 200
    assert changes.served().spec.config.max_batch_delay == 100


REFUSED: tuple[tuple[str, object, int, str], ...] = (
    ("", None, 400, "BadRequestException: Parameter url is required."),
    ("?url=a", {}, 400, "BadRequestException: Parameter url is required."),
    ("?url=", None, 404, "ModelNotFoundException: empty url"),
    ("?url=none.mar", None, 404, "ModelNotFoundException: Model not found at: none.mar"),
    ("?url=../a", None, 404, "ModelNotFoundException: Relative path is not allowed in url: ../a"),
    ("?url=a&s3_sse_kms=true", None, 400, "BadRequestException: s3_sse_kms: found true, allowed: false"),
    ("?url=a&runtime=java", None, 400, "BadRequestException: Invalid RuntimeType value: java"),
    (
        "",
        {"url": "a", "batch_size": "x"},
        400,
        'BadRequestException: batch_size: found "x", allowed: a whole number up to 2147483647',
    ),
    ("", [1], 400, "BadRequestException: the body: found [1], allowed: a JSON object"),
    ("?url=a&handler=../x.py", None, 400, "InvalidModelException: "),
)


async def test_what_cannot_be_registered_says_why(changes: Changes) -> None:
    for query, body, status, message in REFUSED:
        got, text = await changes.call("POST", f"/models{query}", body)
        assert (got, text[: len(message)]) == (status, message)
        assert not changes.rig.registry.versions("a")


async def test_a_version_is_registered_once(changes: Changes) -> None:
    await changes.call("POST", "/models?url=a")
    assert await changes.call("POST", "/models?url=a") == (
        409,
        "ConflictStatusException: Model version 1.0 is already registered for model a",
    )


# ── scale ──


SCALED = (
    ("/models/m", (1, 1), 202, "Processing worker updates..."),
    ("/models/m?min_worker=3", (3, 3), 202, "Processing worker updates..."),
    ("/models/m?min_worker=2&max_worker=4&synchronous=true", (2, 4), 200, "Workers scaled to 2 for model: m"),
    ("/models/m/1.0?min_worker=0&synchronous=TRUE", (0, 0), 200, "Workers scaled to 0 for model: m, version: 1.0"),
    (
        "/models/m?model_version=1.0&min_worker=2&synchronous=true",
        (2, 2),
        200,
        "Workers scaled to 2 for model: m, version: 1.0",
    ),
    ("/models/m?min_worker=x&synchronous=true", (1, 1), 200, "Workers scaled to 1 for model: m"),
)


async def test_workers_are_scaled(changes: Changes) -> None:
    for path, scaled, status, text in SCALED:
        assert await changes.call("PUT", path) == (status, text)
        assert changes.rig.supervisor().resized.pop() == scaled


NOT_SCALED = (
    (
        "/models/m?min_worker=2&max_worker=1",
        400,
        "BadRequestException: max_worker cannot be less than min_worker.",
    ),
    ("/models/none?min_worker=1", 404, "ModelNotFoundException: Model not found: none"),
    (
        "/models/m/9?min_worker=1",
        404,
        "ModelVersionNotFoundException: Model version: 9 does not exist for model: m",
    ),
)


async def test_what_cannot_be_scaled_says_why_also_to_those_who_do_not_wait(changes: Changes) -> None:
    for path, status, text in NOT_SCALED:
        for synchronous in ("true", "false"):
            assert await changes.call("PUT", f"{path}&synchronous={synchronous}") == (status, text)
    assert changes.rig.supervisor().resized == []


async def test_scaling_waits_only_if_asked_to(changes: Changes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.frontend.changing.LATE_S", -20.0)  # of the 20 s that a start may take
    supervisor = changes.rig.supervisor()
    supervisor.starting = asyncio.Event()
    assert (await changes.call("PUT", "/models/m?min_worker=2"))[0] == 202
    assert await changes.call("PUT", "/models/m?min_worker=2&synchronous=true") == (
        206,
        "Workers scaling in progress...",
    )
    supervisor.starting = WorkerFailed(FAILED)
    assert await changes.call("PUT", "/models/m?min_worker=2&synchronous=true") == (
        500,
        f"InternalServerException: Failed to start workers for model m version: 1.0: {FAILED}",
    )
    assert changes.served("m").workers == 2, "it stays registered"


async def test_a_call_that_need_not_wait_is_not_held_up_by_another_change(
    changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minserve.frontend.changing.PROMPT_S", 0.0)
    async with changes.rig.registry._changes._locks["m", "1.0"]:
        assert (await changes.call("PUT", "/models/m?min_worker=2"))[0] == 202
        assert changes.rig.supervisor().resized == []
    await until(lambda: changes.rig.supervisor().resized == [(2, 2)])


async def test_what_goes_wrong_when_nobody_waits_any_more_is_in_the_log(
    changes: Changes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("minserve.frontend.changing.PROMPT_S", 0.0)
    async with changes.rig.registry._changes._locks["m", "1.0"]:
        assert (await changes.call("PUT", "/models/m?min_worker=2"))[0] == 202
        changes.rig.registry._catalogue.remove(changes.served("m"))
    await until(lambda: "a model is not scaled after all: Model not found: m" in caplog.text)


# ── versions ──


async def test_versions_are_registered_made_the_default_and_unregistered(changes: Changes) -> None:
    await changes.call("POST", "/models?url=a")
    await changes.call("POST", "/models?url=a2")
    assert changes.served().spec.version == "1.0", "the first is the default"
    assert await changes.call("PUT", "/models/a/2.0/set-default") == (
        200,
        'Default version successfully updated for model "a" to "2.0"',
    )
    assert changes.served().spec.version == "2.0"
    async with changes.rig.management.get("/models") as response:
        assert json.loads(await response.text())["models"][0] == {"modelName": "a", "modelUrl": "a2"}
    async with changes.rig.management.get("/models/a/all") as response:
        versions = json.loads(await response.text())
    assert [(one["modelVersion"], one["modelUrl"]) for one in versions] == [("1.0", "a"), ("2.0", "a2")]
    assert [one["loadedAtStartup"] for one in versions] == [False, False]
    for path in ("/models/a", "/models/a/2.0"):
        assert await changes.call("DELETE", path) == (
            403,
            "InvalidModelVersionException: Cannot remove default version for model a",
        )
    assert await changes.call("DELETE", "/models/a/1.0") == (200, 'Model "a" unregistered')
    assert await changes.call("DELETE", "/models/a/1.0") == (
        404,
        "ModelVersionNotFoundException: Model version: 1.0 does not exist for model: a",
    )
    assert await changes.call("DELETE", "/models/a") == (200, 'Model "a" unregistered')
    assert await changes.call("DELETE", "/models/a") == (404, "ModelNotFoundException: Model not found: a")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/models/m/9/set-default", "ModelVersionNotFoundException: Model version 9 does not exist for model m"),
        ("/models/none/1.0/set-default", "ModelNotFoundException: Model not found: none"),
    ],
)
async def test_only_a_version_that_is_there_becomes_the_default(changes: Changes, path: str, text: str) -> None:
    assert await changes.call("PUT", path) == (404, text)


async def test_a_model_that_cannot_be_read_is_unregistered_too(changes: Changes) -> None:
    changes.rig.registry.broken["bad"] = ConfigError("a.mar: junk")
    assert await changes.call("DELETE", "/models/bad") == (200, 'Model "bad" unregistered')
    assert changes.rig.registry.broken == {}


async def test_unregistering_takes_no_longer_than_it_may(changes: Changes) -> None:
    registry = changes.rig.registry
    registry._changes._options = registry._options.model_copy(update={"unregister_model_timeout": 0.01})
    call = asyncio.create_task(changes.rig.inference.post("/predictions/m", data=b""))
    changes.rig.lane.handle = lambda request: None
    await until(lambda: changes.rig.lane.requests)
    assert await changes.call("DELETE", "/models/m") == (
        408,
        "RequestTimeoutException: Timed out while cleaning resources: m",
    )
    call.cancel()


# ── what is allowed ──


@pytest.mark.parametrize("options", [OPTIONS], ids=["off"])
async def test_models_are_changed_over_http_only_where_that_is_enabled(rig: Rig) -> None:
    changes = Changes(rig)
    text = "MethodNotAllowedException: Requested method is not allowed, please refer to API document."
    for method, path in (("POST", "/models?url=a"), ("DELETE", "/models/m"), ("DELETE", "/models/m/1.0")):
        assert await changes.call(method, path) == (405, text)
    assert (await changes.call("PUT", "/models/m?min_worker=2"))[0] == 202, "scaling always is"
    assert (await changes.call("PUT", "/models/m/1.0/set-default"))[0] == 200


# ── no workers ──


@pytest.mark.parametrize(
    ("path", "which"), [("/predictions/m", '"m"'), ("/predictions/m/1.0", '"m" Version 1.0"'), ("/m/predict", '"m"')]
)
async def test_without_workers_a_request_is_told_so_in_torchserves_words(rig: Rig, path: str, which: str) -> None:
    rig.registry.find("m").dispatcher.refuse(NoWorkers("m"))
    async with rig.inference.post(path, data=b"x") as response:
        assert response.status == 503
        assert "Retry-After" not in response.headers
        assert json.loads(await response.text()) == {
            "code": 503,
            "type": "ServiceUnavailableException",
            "message": f"Model {which} has no worker to serve inference request. Please use scale workers API to add "
            "workers. If this is a sequence inference, please check if it is closed, or expired; or exceeds "
            "maxSequenceJobQueueSize",
        }


async def test_names_are_taken_apart_after_they_are_routed(changes: Changes) -> None:
    """A slash in a name is no path."""
    name = quote("no/such", safe="")
    assert await changes.call("PUT", f"/models/{name}?min_worker=1") == (
        404,
        "ModelNotFoundException: Model not found: no/such",
    )
