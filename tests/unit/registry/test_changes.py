"""Models come, change and go while the server runs. The workers are fake groups, the archives are real."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from minserve.config.server import ServerOptions
from minserve.dispatch.request import Reply, Request
from minserve.errors import (
    BadRequest,
    CleanupTimeout,
    ConfigError,
    Conflict,
    Draining,
    InvalidModel,
    InvalidModelVersion,
    ModelNotFound,
    ModelVersionNotFound,
    NoWorkers,
    WorkerFailed,
)
from minserve.registry.models import Registration, Registry, ServedModel
from minserve.registry.watch import watch
from minserve.wire.messages import RequestMeta
from minserve.worker.devices import Inventory
from tests.unit.registry.archives import make_mar, short_runtime
from tests.unit.worker.groups import FakeGroup, no_ranks, no_starter, settle
from tests.unit.worker.specs import until

pytestmark = pytest.mark.asyncio


class Home:
    """A registry over a store in a folder."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.store = folder / "store"
        self.store.mkdir()
        self.runtime = short_runtime(folder)
        self.options = ServerOptions.model_validate({"model_store": str(self.store), **options})
        self.changes = 0
        self.registry = Registry(self.runtime, Inventory(), no_starter(), lambda: None, self.options)
        self.registry.on_models_changed = self._changed

    def _changed(self) -> None:
        self.changes += 1

    async def register(self, url: str = "m.mar", workers: int | None = 1, name: str | None = None) -> ServedModel:
        served = await self.registry.register(Registration(url, name, initial_workers=workers))
        assert await served.wait_started(10)
        return served

    def extracted(self) -> list[str]:
        return sorted(path.name for path in self.runtime.models.glob("x*"))

    def submit(self, served: ServedModel) -> asyncio.Task[Reply]:
        loop = asyncio.get_running_loop()
        request = Request(RequestMeta("", (), ()), [], loop.time() + 60, loop.create_future())
        return asyncio.create_task(served.dispatcher.submit(request))


@pytest_asyncio.fixture
async def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Home]:
    no_ranks(monkeypatch)
    home = Home(tmp_path, unregister_model_timeout=0.3)
    make_mar(home.store / "m.mar")
    make_mar(home.store / "m2.mar", modelVersion="2.0", configFile="c.yaml", files={"c.yaml": "batchSize: 2"})
    yield home
    await home.registry.stop()
    home.runtime.remove()


def finish() -> None:
    for group in FakeGroup.living():
        while group.busy:
            group.finish()


async def test_versions_come_and_the_first_is_the_default_until_another_is_chosen(home: Home) -> None:
    first, second = await home.register("m.mar"), await home.register("m2.mar")
    registry = home.registry
    assert registry.versions("m") == list(registry.models()) == [first, second]
    assert registry.find("m") is first
    assert registry.find("m", "2.0") is second
    assert (first.is_default, second.is_default) == (True, False)
    assert not first.loaded_at_startup
    assert (second.spec.config.batch_size, second.spec.url) == (2, "m2.mar")
    registry.set_default("m", "2.0")
    assert registry.find("m") is second
    assert (first.is_default, second.is_default) == (False, True)
    assert home.changes == 3
    with pytest.raises(ModelVersionNotFound, match=r"^Model version 3 does not exist for model m$"):
        registry.set_default("m", "3")
    with pytest.raises(ModelNotFound, match=r"^Model not found: n$"):
        registry.set_default("n", "1.0")


async def test_what_is_registered_already_is_a_conflict_and_leaves_nothing(home: Home) -> None:
    await home.register()
    before = home.extracted()
    results = await asyncio.gather(home.register(), home.register(), return_exceptions=True)
    assert [str(result) for result in results] == ["Model version 1.0 is already registered for model m"] * 2
    assert all(isinstance(result, Conflict) for result in results)
    assert home.extracted() == before
    assert (home.store / "m.mar").exists()


async def test_of_two_at_once_one_wins(home: Home) -> None:
    results = await asyncio.gather(home.register(), home.register(), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Conflict", "ServedModel"]
    assert len(home.extracted()) == 1


async def test_an_archive_that_is_none_is_refused_and_leaves_nothing(home: Home) -> None:
    (home.store / "junk.mar").write_bytes(b"PK\x03\x04 no")
    make_mar(home.store / "wrong.mar", handler="none.py")
    for url, message in (("junk.mar", "junk.mar"), ("wrong.mar", "handler: found")):
        with pytest.raises(InvalidModel, match=message):
            await home.register(url)
    assert home.extracted() == []
    assert home.changes == 0


async def test_an_address_writes_no_line_of_its_own_into_the_log(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ModelNotFound):
        await home.register("x\n2026-01-01 a line of its own/m.mar")
    assert "of its own" not in caplog.text
    with pytest.raises(ModelNotFound) as raised:
        await home.register("x/" * 100_000 + "m.mar")
    assert len(str(raised.value)) < 10_000
    with pytest.raises(InvalidModel, match="model name: found"):
        await home.register(name="x" * 256)


async def test_more_workers_than_anybody_means_are_refused(home: Home) -> None:
    with pytest.raises(InvalidModel, match=r"workers: found 1001 of 1 rank\(s\) each, allowed: at most 1000 ranks"):
        await home.register(workers=1001)
    many = {"c.yaml": "parallelType: tp\ntorchrun: {nproc-per-node: 1001}\n"}
    make_mar(home.store / "many.mar", modelName="many", configFile="c.yaml", files=many)
    with pytest.raises(InvalidModel, match=r"workers: found 0 of 1001 rank\(s\) each"):
        await home.register("many.mar", workers=0)
    await home.register()
    with pytest.raises(BadRequest, match="min_worker: found 1001, allowed: at most 1000"):
        await home.registry.scale("m", None, 1001, 1001)
    assert len(FakeGroup.living()) == len(home.extracted()) == 1


async def test_a_model_without_workers_refuses_until_it_has_some(home: Home) -> None:
    served = await home.register(workers=None)
    assert (served.workers, served.supervisor.report()) == (0, [])
    with pytest.raises(NoWorkers):
        await home.submit(served)
    assert await home.registry.scale("m", None, 2, 3) is served
    assert await served.wait_started(10)
    assert len(FakeGroup.living()) == 2
    assert (served.workers, served.spec.config.max_workers_or(0)) == (2, 3)
    await home.registry.scale("m", "1.0", 0, 0)
    await served.supervisor.settled()
    assert FakeGroup.living() == []
    for numbers, message in (((2, 1), "^max_worker cannot be less than min_worker.$"), ((-1, 1), "min_worker")):
        with pytest.raises(BadRequest, match=message):
            await home.registry.scale("m", None, *numbers)
    with pytest.raises(ModelVersionNotFound):
        await home.registry.scale("m", "9", 1, 1)


async def test_whoever_waits_for_the_start_is_told_of_a_failure_and_may_take_the_model_away(home: Home) -> None:
    FakeGroup.failing["load"] = WorkerFailed("m/0: no weights")
    served = await home.registry.register(Registration("m.mar", initial_workers=1))
    with pytest.raises(WorkerFailed, match="no weights"):
        await served.wait_started(10)
    await home.registry.unregister("m", "1.0")
    assert home.registry.versions("m") == []
    assert home.extracted() == []


async def test_a_start_that_takes_its_time_is_not_waited_for_longer_than_asked(home: Home) -> None:
    FakeGroup.hanging.add("load")
    served = await home.registry.register(Registration("m.mar", initial_workers=1))
    assert await served.wait_started(0.01) is False


async def test_another_version_takes_over_without_a_failed_request(home: Home) -> None:
    first = await home.register("m.mar")
    in_flight, waiting = home.submit(first), home.submit(first)
    await settle()
    second = await home.register("m2.mar")
    with pytest.raises(InvalidModelVersion, match=r"^Cannot remove default version for model m$"):
        await home.registry.unregister("m")
    home.registry.set_default("m", "2.0")
    gone = asyncio.create_task(home.registry.unregister("m", "1.0"))
    await settle()
    assert home.registry.find("m") is second
    assert first.gone
    with pytest.raises(ModelVersionNotFound):
        home.registry.find("m", "1.0")
    late = home.submit(first)  # it had found the version before, and its body came slowly
    await settle()
    for client in (in_flight, waiting, late):
        finish()
        assert (await client).body == b"ok"
    await gone
    with pytest.raises(ModelNotFound):
        await home.submit(first)
    assert len(FakeGroup.living()) == 1
    assert len(home.extracted()) == 1
    again = await home.register("m.mar")
    assert home.registry.versions("m") == [second, again]


async def test_shared_memory_for_bodies_goes_with_the_model(home: Home) -> None:
    arena = (await home.register()).dispatcher.arena
    assert arena is not None
    assert arena.allocate(1) is not None
    await home.registry.unregister("m")
    assert arena.allocate(1) is None


async def test_the_last_version_may_go_and_takes_the_name_along(home: Home) -> None:
    await home.register()
    await home.registry.unregister("m")
    with pytest.raises(ModelNotFound, match=r"^Model not found: m$"):
        home.registry.find("m")
    with pytest.raises(ModelNotFound):
        await home.registry.unregister("m")
    assert home.extracted() == []
    assert FakeGroup.living() == []
    assert (home.store / "m.mar").exists()


async def test_a_model_that_does_not_end_in_time_is_killed_and_gone(home: Home) -> None:
    served = await home.register()
    client = home.submit(served)
    await settle()
    with pytest.raises(CleanupTimeout, match=r"^Timed out while cleaning resources: m$"):
        await home.registry.unregister("m")
    with pytest.raises(WorkerFailed):
        await client
    assert FakeGroup.living() == []
    assert home.extracted() == []


async def test_the_same_version_comes_again_once_the_old_one_has_gone(home: Home) -> None:
    """It would have the devices of the other's workers, which go by name."""
    served = await home.register()
    client = home.submit(served)
    await settle()
    gone = asyncio.create_task(home.registry.unregister("m"))
    await settle()
    again = asyncio.create_task(home.register())
    await until(lambda: len(home.extracted()) == 2)
    await settle()
    assert not again.done()
    assert len(FakeGroup.made) == 1
    finish()
    await client
    await gone
    assert (await again).is_default


async def test_a_caller_that_leaves_undoes_nothing(home: Home) -> None:
    caller = asyncio.create_task(home.registry.register(Registration("m.mar", initial_workers=1)))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    await until(lambda: home.registry.versions("m"))
    await until(FakeGroup.living)


async def test_a_reload_reads_the_archive_again_and_keeps_to_what_was_asked_for(home: Home) -> None:
    served = await home.registry.register(Registration("m.mar", batch_size=7))
    await home.registry.scale("m", None, 2, 2)
    before = home.extracted()
    make_mar(home.store / "m.mar", configFile="c.yaml", files={"c.yaml": "batchSize: 2\nresponseTimeout: 9"})
    await home.registry.reload("m")
    assert (served.spec.config.batch_size, served.spec.response_timeout) == (7, 9)
    assert len(FakeGroup.living()) == served.workers == 2
    assert len(home.extracted()) == 1
    assert home.extracted() != before
    assert {group.spec.model_dir.parent.name for group in FakeGroup.living()} == set(home.extracted())


async def test_a_reload_that_fails_leaves_the_old_files_and_nothing_of_the_new(home: Home) -> None:
    served = await home.register()
    before = home.extracted()
    make_mar(home.store / "m.mar", modelVersion="2.0")
    with pytest.raises(ConfigError, match=r"found m, version 2\.0, allowed: m, version 1\.0"):
        await home.registry.reload("m")
    (home.store / "m.mar").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ConfigError):
        await home.registry.reload("m")
    make_mar(home.store / "m.mar")
    FakeGroup.loads = [WorkerFailed("m/1: a typo")]
    with pytest.raises(WorkerFailed):
        await home.registry.reload("m")
    assert home.extracted() == before
    client = home.submit(served)
    await settle()
    finish()
    assert (await client).body == b"ok"


async def test_a_broken_model_can_be_put_right_or_forgotten(home: Home) -> None:
    home.registry.broken = {"x": ConfigError("no"), "m": ConfigError("no")}
    await home.register("m.mar")
    await home.registry.unregister("x")
    assert home.registry.broken == {}


async def test_a_server_that_stops_takes_nothing_in_any_more(home: Home) -> None:
    registering = asyncio.create_task(home.registry.register(Registration("m.mar")))
    await asyncio.sleep(0)
    await home.registry.stop()
    with pytest.raises(Draining):
        await registering
    with pytest.raises(Draining):
        await home.registry.register(Registration("m2.mar"))
    assert home.registry.versions("m") == []


async def test_a_folder_of_the_store_is_registered_as_it_lies_there(home: Home) -> None:
    (home.store / "plain").mkdir()
    (home.store / "plain" / "handler.py").touch()
    served = await home.register("plain")
    assert (served.spec.name, served.spec.version, served.spec.model_dir) == ("plain", "1.0", home.store / "plain")
    await home.registry.unregister("plain")
    assert (home.store / "plain" / "handler.py").exists()


async def test_a_file_that_was_fetched_for_a_model_goes_with_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(url: str, store: Path, allowed_urls: list[str]) -> Path:
        return make_mar(store / "far.mar", modelName="far")

    monkeypatch.setattr("minserve.registry.fetching.fetch", fetch)
    served = await home.register("https://models.example/far.mar")
    assert served.spec.url == "https://models.example/far.mar"
    await home.registry.unregister("far")
    assert not (home.store / "far.mar").exists()


async def test_what_is_in_the_store_is_not_fetched_and_stays(home: Home) -> None:
    await home.register(f"file://{home.store}/m.mar")
    await home.registry.unregister("m")
    assert (home.store / "m.mar").exists()


async def test_of_two_reloads_of_a_broken_model_the_second_finds_it_served(home: Home) -> None:
    home.registry.broken = {"m": ConfigError("no")}
    await asyncio.gather(home.registry.reload("m"), home.registry.reload("m"))
    assert home.registry.broken == {}
    assert len(home.registry.versions("m")) == 1
    assert len(home.extracted()) == 1


async def test_an_archive_that_changes_is_reloaded_whichever_version_it_is(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("minserve.registry.watch.LOOK_S", 0.001)
    await home.register("m.mar")
    second = await home.register("m2.mar")
    home.registry.broken = {"junk": ConfigError("no")}
    make_mar(home.store / "junk.mar", modelName="junk")
    watching = asyncio.create_task(watch(home.registry))
    await until(lambda: caplog.text.count("reloads when") == 3)  # it has seen the files as they are
    make_mar(home.store / "m2.mar", modelVersion="2.0", configFile="c.yaml", files={"c.yaml": "batchSize: 5"})
    make_mar(home.store / "junk.mar", modelName="junk", modelVersion="3.0")
    await until(lambda: second.spec.config.batch_size == 5 and home.registry.versions("junk"))
    watching.cancel()
    assert home.registry.find("m").spec.config.batch_size == 1


@pytest.mark.parametrize("hurry", [False, True])
async def test_a_stop_does_not_wait_for_what_an_unregistered_model_was_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hurry: bool
) -> None:
    no_ranks(monkeypatch)
    home = Home(tmp_path)
    text = "minserve: {drainTimeout: 0.05}"
    make_mar(home.store / "m.mar", configFile="c.yaml", files={"c.yaml": text if not hurry else "{}"})
    served = await home.register()
    client = home.submit(served)
    await settle()
    gone = asyncio.create_task(home.registry.unregister("m"))
    await settle()
    stop = asyncio.create_task(home.registry.stop())
    await settle()
    if hurry:
        stop.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait([stop, gone])
    with pytest.raises(WorkerFailed):
        await client
    gone.result()
    assert FakeGroup.living() == []
    home.runtime.remove()
