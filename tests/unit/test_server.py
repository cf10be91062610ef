import asyncio
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.config.server import ServerOptions
from minserve.errors import StartupError
from minserve.registry.models import Registry
from minserve.server import Server
from minserve.worker.runtime import live_servers
from tests.unit.frontend.rig import FakeSupervisor

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No worker is started, and the signals are pytest's again afterwards."""
    monkeypatch.setattr("minserve.registry.models.Supervisor", FakeSupervisor)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("r")), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    model(tmp_path, "good", "")
    return tmp_path


def model(store: Path, name: str, text: str) -> None:
    (store / name).mkdir()
    (store / name / "handler.py").touch()
    (store / name / "model-config.yaml").write_text(text)


def options(store: Path, **more: object) -> ServerOptions:
    return ServerOptions.model_validate({"model_store": str(store), "inference_port": 0, "management_port": 0, **more})


async def get(url: str) -> int:
    def fetch() -> int:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    return await asyncio.to_thread(fetch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_listens_tells_where_and_ends_clean_on_a_signal(
    store: Path, environ: dict[str, str], number: signal.Signals
) -> None:
    server = Server(options(store), environ)
    run = asyncio.create_task(server.run())
    async with asyncio.timeout(10):
        await server.listening.wait()
        assert await get(f"{server.inference_url}/ping") == 200
        assert await get(f"{server.management_url}/models/good") == 200
        (live,) = live_servers(environ)
        assert (live.pid, live.inference, live.management) == (os.getpid(), server.inference_url, server.management_url)
        os.kill(os.getpid(), number)
        await run
    supervisor: object = server.registry.find("good").supervisor
    assert isinstance(supervisor, FakeSupervisor)
    assert supervisor.stopped == [30]
    assert os.listdir(environ["XDG_RUNTIME_DIR"]) == []
    with pytest.raises(urllib.error.URLError, match="refused"):
        await get(f"{server.inference_url}/ping")


async def test_a_broken_model_beside_a_good_one_is_one_line_and_the_server_runs(
    store: Path, environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    model(store, "bad", "batchSize: true")
    server = Server(options(store), environ)
    run = asyncio.create_task(server.run())
    async with asyncio.timeout(10):
        await server.listening.wait()
        assert await get(f"{server.inference_url}/ping") == 500
        assert await get(f"{server.management_url}/models/good") == 200
        assert await get(f"{server.inference_url}/predictions/bad") == 503
        os.kill(os.getpid(), signal.SIGTERM)
        await run
    (line,) = [record.getMessage() for record in caplog.records if "bad" in record.getMessage()]
    assert line.startswith("bad is not served: ")
    assert "batchSize: found true" in line


async def test_groups_choose_their_devices_before_single_processes(
    store: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model(store, "group", "parallelType: tp\nparallelLevel: 2")
    added: list[str] = []
    monkeypatch.setattr(Registry, "add", lambda self, model: added.append(model.spec.name))
    server = Server(options(store), environ)
    run = asyncio.create_task(server.run())
    async with asyncio.timeout(10):
        await server.listening.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await run
    assert added == ["group", "good"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model_store": "/nonexistent"}, "^model store /nonexistent: no such directory$"),
        ({"load_models": ["none"]}, "^model none: no directory "),
        ({"load_models": ["bad"]}, "^no model with a valid configuration in .*: .*batchSize: found true"),
        ({"load_models": []}, "^no model with a valid configuration in .*: there is none$"),
        ({"load_models": ["good", "good"]}, "^two models are called good: .*/good is the second$"),
        ({"load_models": ["x=good", "x=bad"]}, "^two models are called x: .*/bad is the second$"),
        ({"host": "192.0.2.1"}, "^cannot listen on 192.0.2.1:0: .*; --inference-port chooses another$"),
    ],
)
async def test_a_start_that_makes_no_sense_is_one_line_before_anything_is_started(
    store: Path, environ: dict[str, str], more: dict[str, object], message: str
) -> None:
    model(store, "bad", "batchSize: true")
    with pytest.raises(StartupError, match=message) as caught:
        await Server(options(store, **more), environ).run()
    assert "\n" not in str(caught.value)
    assert os.listdir(environ["XDG_RUNTIME_DIR"]) == []


async def test_a_taken_port_is_said_with_the_option_that_chooses_another(store: Path, environ: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError) as caught:
            await Server(options(store, inference_port=port), environ).run()
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use; --inference-port chooses another"
    )
