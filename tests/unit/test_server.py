import asyncio
import os
import resource
import shutil
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.client import Client
from minserve.config.server import ServerOptions
from minserve.errors import MinServeError, StartupError
from minserve.registry.models import Registry, ValidModel
from minserve.server import SIGNALS, Server, _raise_open_files, environment_of_models
from minserve.worker.runtime import live_servers
from tests.unit.frontend.rig import FakeSupervisor

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No worker is started, and the signals are pytest's again afterwards."""
    monkeypatch.setattr("minserve.registry.making.Supervisor", FakeSupervisor)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    resource.setrlimit(resource.RLIMIT_NOFILE, files)


@pytest.fixture
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"MINSERVE_RUNTIME_DIR": str(tmp_path_factory.mktemp("r")), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    model(tmp_path, "good", "")
    return tmp_path


def model(store: Path, name: str, text: str) -> None:
    (store / name).mkdir()
    (store / name / "handler.py").touch()
    (store / name / "model-config.yaml").write_text(text)


def options(store: Path, **more: object) -> ServerOptions:
    return ServerOptions.model_validate(
        {"model_store": str(store), "inference_port": 0, "management_port": 0, "metrics_port": 0, **more}
    )


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
    assert os.listdir(environ["MINSERVE_RUNTIME_DIR"]) == []
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
        ({"load_models": ["none"]}, "^model none: .*/none: no such directory or archive$"),
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
    assert os.listdir(environ["MINSERVE_RUNTIME_DIR"]) == []


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


# ── the end, stage by stage ──


class Draining(FakeSupervisor):
    """Has a request in flight, for as long as the test says."""

    finished: asyncio.Event
    began: asyncio.Event
    cut_short: bool = False

    async def stop(self, drain_timeout: float, refusal: MinServeError | None = None) -> None:
        self.began.set()
        if self.cut_short:
            return
        try:
            await self.finished.wait()
        except asyncio.CancelledError:
            type(self).cut_short = True
            await asyncio.sleep(0)  # it still has to kill
            raise


class Stopping:
    """A server of one model that drains; it is told of signals as the loop would tell it."""

    def __init__(self, store: Path, environ: dict[str, str], **more: object) -> None:
        self.server = Server(options(store, **more), environ)
        self.run = asyncio.create_task(self.server.run())
        Draining.finished, Draining.began, Draining.cut_short = asyncio.Event(), asyncio.Event(), False

    async def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        await self.server.listening.wait()
        self.server._signalled(number)
        for _ in range(10):
            await asyncio.sleep(0)

    async def end(self) -> None:
        async with asyncio.timeout(10):
            await self.run


@pytest.fixture
def draining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.registry.making.Supervisor", Draining)


async def test_during_the_delay_the_server_serves_and_is_not_ready(
    store: Path, environ: dict[str, str], draining: None
) -> None:
    stopping = Stopping(store, environ, shutdown_delay=0.3)
    await stopping.server.listening.wait()
    stops = [stopping.server.registry.stopping]
    await stopping.signal()
    stops.append(stopping.server.registry.stopping)
    assert stops == [False, True]
    assert not Draining.began.is_set()
    assert await get(f"{stopping.server.management_url}/models/good") == 200
    await Draining.began.wait()
    Draining.finished.set()
    await stopping.end()


async def test_each_further_signal_cuts_one_stage_short(
    store: Path, environ: dict[str, str], draining: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    stopping = Stopping(store, environ, shutdown_delay=600.0)
    await stopping.signal()
    stages = [Draining.began.is_set()]
    await stopping.signal(signal.SIGINT)
    stages += [Draining.began.is_set(), Draining.cut_short, stopping.run.done()]
    await stopping.signal()
    await stopping.end()
    assert stages == [False, True, False, False]
    assert Draining.cut_short
    assert os.listdir(environ["MINSERVE_RUNTIME_DIR"]) == []
    assert caplog.messages[-1] == "stopped"


async def test_a_terminal_that_closes_does_not_cut_anything_short(
    store: Path, environ: dict[str, str], draining: None
) -> None:
    stopping = Stopping(store, environ)
    for _ in range(3):
        await stopping.signal(signal.SIGHUP)
    assert Draining.began.is_set()
    assert not stopping.run.done()
    Draining.finished.set()
    await stopping.end()
    assert not Draining.cut_short


async def test_signals_that_come_before_the_server_listens_count(
    store: Path, environ: dict[str, str], draining: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = Stopping(store, environ)
    add = Registry.add

    def add_and_signal(registry: Registry, model: ValidModel) -> None:
        add(registry, model)
        for number in (signal.SIGTERM, signal.SIGINT):
            stopping.server._signalled(number)

    monkeypatch.setattr(Registry, "add", add_and_signal)
    await stopping.end()
    assert Draining.cut_short


async def test_a_server_that_is_stopped_while_it_reads_its_models_starts_none(
    store: Path, environ: dict[str, str], draining: None
) -> None:
    stopping = Stopping(store, environ)
    stopping.server._signalled(signal.SIGTERM)
    await stopping.end()
    assert not Draining.began.is_set()
    assert os.listdir(environ["MINSERVE_RUNTIME_DIR"]) == []


async def test_a_drain_that_fails_is_told(
    store: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop(self: Registry) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Registry, "stop", stop)
    stopping = Stopping(store, environ)
    await stopping.signal()
    with pytest.raises(ZeroDivisionError):
        await stopping.end()
    assert os.listdir(environ["MINSERVE_RUNTIME_DIR"]) == []


@pytest.mark.parametrize("number", SIGNALS)
async def test_no_signal_after_the_end_changes_the_exit_code(
    store: Path, environ: dict[str, str], number: signal.Signals
) -> None:
    stopping = Stopping(store, environ)
    await stopping.signal()
    await stopping.end()
    assert signal.getsignal(number) is signal.SIG_IGN
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


async def test_nohup_is_obeyed(store: Path, environ: dict[str, str]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopping = Stopping(store, environ)
    await stopping.server.listening.wait()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    await stopping.signal()
    await stopping.end()


async def test_what_a_worker_needs_is_made_anew_before_it_starts_again(store: Path, environ: dict[str, str]) -> None:
    stopping = Stopping(store, environ)
    await stopping.server.listening.wait()
    directory = Path(environ["MINSERVE_RUNTIME_DIR"]) / f"minserve-{os.getpid()}"
    shutil.rmtree(directory)
    stopping.server._worker_changed()
    assert (directory / "m1").is_dir()
    assert stopping.server.changed.is_set()
    assert [live.pid for live in live_servers(environ)] == [os.getpid()]
    await stopping.signal()
    await stopping.end()


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"),
    [
        (1024, 4096, 4096),
        (1024, 10**9, 65536),
        (1024, resource.RLIM_INFINITY, 65536),
        (10**6, 10**6, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
        (4096, 4096, None),
    ],
)
async def test_the_server_takes_as_many_descriptors_as_it_may(
    soft: int, hard: int, wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    _raise_open_files()
    assert limits == ([] if wanted is None else [(wanted, hard)])


# ── addresses, and what models get of the environment ──


async def test_one_address_for_all_three(
    store: Path, environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("s")
    url = f"unix:{folder}/s"
    addresses = {"inference_address": url, "management_address": url, "metrics_address": url}
    server = Server(options(store, **addresses), environ)
    run = asyncio.create_task(server.run())
    async with asyncio.timeout(10):
        await server.listening.wait()
        assert {server.inference_url, server.management_url, server.metrics_url} == {url}

        def statuses() -> list[int]:
            found = []
            for path in ("/ping", "/predictions/none", "/models/good", "/metrics", "/nothing"):
                link = Client(url).connection(10)
                link.request("GET", path)
                found.append(link.getresponse().status)
                link.close()
            return found

        assert await asyncio.to_thread(statuses) == [200, 404, 200, 200, 404]
        os.kill(os.getpid(), signal.SIGTERM)
        await run
    assert os.listdir(folder) == []


async def test_without_metrics_there_is_no_address_for_them(store: Path, environ: dict[str, str]) -> None:
    server = Server(options(store, enable_metrics_api=False), environ)
    run = asyncio.create_task(server.run())
    async with asyncio.timeout(10):
        await server.listening.wait()
        (live,) = live_servers(environ)
        assert (server.metrics_url, live.metrics) == ("", "")
        assert await get(f"{server.inference_url}/metrics") == 404
        os.kill(os.getpid(), signal.SIGTERM)
        await run


async def test_a_certificate_that_is_not_there_is_known_before_a_worker_starts(
    store: Path, environ: dict[str, str]
) -> None:
    wrong = {"inference_address": "https://127.0.0.1:0", "certificate_file": "/none", "private_key_file": "/none"}
    server = Server(options(store, **wrong), environ)
    with pytest.raises(StartupError, match="private_key_file /none: No such file"):
        await server.run()
    assert not hasattr(server, "registry")


async def test_models_get_the_environment_without_what_is_blacklisted() -> None:
    environ = {"AWS_KEY": "x", "MY_AWS_KEY": "y", "PATH": "/bin"}
    wanted = ServerOptions(blacklist_env_vars="AWS_.*|PATHS")
    assert environment_of_models(wanted, environ) == {"MY_AWS_KEY": "y", "PATH": "/bin"}
    assert environment_of_models(ServerOptions(number_of_gpu=0), environ) == {**environ, "CUDA_VISIBLE_DEVICES": ""}
    assert environment_of_models(ServerOptions(number_of_gpu=1), {"": "x", **environ})["AWS_KEY"] == "x"
