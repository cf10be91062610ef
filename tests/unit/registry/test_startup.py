"""What a server serves from its start on, and what does not stop it."""

import json
import logging
from pathlib import Path

import pytest

from minserve.config.server import ServerOptions
from minserve.errors import DownloadFailed, StartupError
from minserve.registry.startup import read_models
from minserve.worker.devices import Inventory
from minserve.worker.runtime import RuntimeDirectory
from tests.unit.registry.archives import make_mar, short_runtime

pytestmark = pytest.mark.asyncio


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeDirectory:
    return short_runtime(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    return store


async def start(runtime: RuntimeDirectory, store: Path, **options: object) -> tuple[list[str], dict[str, str]]:
    """Titles of the models, and what is wrong with the others."""
    server = ServerOptions.model_validate({"model_store": str(store), **options})
    models, broken = await read_models(server, Inventory(), runtime)
    return [model.spec.title for model in models], {name: str(error) for name, error in broken.items()}


def extracted(runtime: RuntimeDirectory) -> int:
    return len(list(runtime.models.glob("x*")))


async def test_archives_and_folders_are_served_and_junk_stops_nothing(
    store: Path, runtime: RuntimeDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    make_mar(store / "a.mar", modelName="n", configFile="c.yaml", files={"c.yaml": "BatchSize: 4"})
    make_mar(store / "b.mar", modelName="n", modelVersion="2.0")
    make_mar(store / "c-c.mar", modelName=None)
    (store / "junk.mar").write_bytes(b"junk")
    (store / "plain").mkdir()
    (store / "plain" / "handler.py").touch()
    with caplog.at_level(logging.WARNING):
        titles, broken = await start(runtime, store)
    assert titles == ["n", "n:2.0", "c_c", "plain"]
    assert list(broken) == ["junk"]
    assert any(line.startswith("junk is not served: ") for line in caplog.messages)
    assert any("BatchSize" in line for line in caplog.messages), "what is forgiven is told"
    assert extracted(runtime) == 3


async def test_two_archives_with_one_version_are_an_error_unless_in_the_place_of_torchserve(
    store: Path, runtime: RuntimeDirectory
) -> None:
    for name in ("a.mar", "b.mar"):
        make_mar(store / name)
    with pytest.raises(StartupError, match=r"^two models are called m: .*/b.mar is the second$"):
        await start(runtime, store)
    titles, broken = await start(runtime, store, lenient=True)
    assert titles == ["m"]
    assert broken == {"b": f"{store}/b.mar: Model version 1.0 is already registered for model m"}


@pytest.mark.parametrize("options", [{"lenient": True}, {"enable_model_api": True}])
async def test_a_server_with_models_to_come_may_start_with_none(
    store: Path, runtime: RuntimeDirectory, options: dict[str, object]
) -> None:
    assert await start(runtime, store, **options) == ([], {})
    assert await start(runtime, store, load_models=[], **options) == ([], {})
    (store / "junk.mar").write_bytes(b"junk")
    titles, broken = await start(runtime, store, **options)
    assert (titles, list(broken)) == ([], ["junk"])
    with pytest.raises(StartupError, match=r"^no model with a valid configuration in .*junk.mar"):
        await start(runtime, store)
    assert extracted(runtime) == 0


async def test_in_the_place_of_torchserve_what_is_missing_is_listed(store: Path, runtime: RuntimeDirectory) -> None:
    _, broken = await start(runtime, store, load_models=["x=none.mar"], lenient=True)
    assert broken == {"x": "Model not found at: none.mar"}


async def test_an_address_is_fetched_once(
    store: Path, runtime: RuntimeDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    async def fetch(url: str, store: Path, allowed_urls: list[str]) -> Path:
        fetched.append(url)
        if "none" in url:
            raise DownloadFailed(f"Failed to download archive from: {url}")
        return make_mar(store / "far.mar")

    monkeypatch.setattr("minserve.registry.fetching.fetch", fetch)
    wanted = ["x=https://models.example/far.mar", "https://models.example/none.mar"]
    for _ in range(2):
        titles, broken = await start(runtime, store, load_models=wanted)
        assert titles == ["x"]
        assert broken == {
            "none": "https://models.example/none.mar: Failed to download archive from: https://models.example/none.mar"
        }
    assert fetched.count("https://models.example/far.mar") == 1


async def test_a_snapshot_brings_back_what_was_served_from_elsewhere(
    store: Path, runtime: RuntimeDirectory, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "handler.py").touch()
    make_mar(store / "a.mar")
    make_mar(tmp_path / "b.mar")
    numbers = {"minWorkers": 0, "maxWorkers": 0, "batchSize": 1, "maxBatchDelay": 1, "responseTimeout": 1}
    places = {"a": "a.mar", "b": str(tmp_path / "b.mar"), "c": str(tmp_path / "folder"), "d": str(tmp_path / "no.mar")}
    models = {name: {"1.0": {"marName": place, "defaultVersion": True, **numbers}} for name, place in places.items()}
    with pytest.raises(StartupError, match=r"model d, .*/no.mar: Model not found at"):
        await start(runtime, store, model_snapshot=json.dumps({"models": models}))
    del models["d"]
    assert await start(runtime, store, model_snapshot=json.dumps({"models": models})) == (["a", "b", "c"], {})
