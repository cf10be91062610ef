import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import minserve
from minserve.cli import app
from minserve.client import Client
from minserve.wire.messages import Part, RequestMeta
from minserve.wire.recording import MAGIC, AnyRecord, Header, Sent, encode

SCHEMA_COPY = Path(__file__).parents[2] / "configs" / "model-config.schema.json"

Run = Callable[..., Result]


@pytest.fixture
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "MINSERVE_RUNTIME_DIR": str(tmp_path_factory.mktemp("r")),  # servers that really run here are left alone
        "CUDA_VISIBLE_DEVICES": "",
        "MINSERVE_LOG_LEVEL": "",
        "TERM": "dumb",
    }


@pytest.fixture
def run(environ: dict[str, str]) -> Run:
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)), env=environ)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A model whose handler leaves a mark where it is loaded."""
    path = tmp_path / "store" / "m"
    path.mkdir(parents=True)
    (path / "handler.py").write_text(
        f"open({str(tmp_path / 'loaded')!r}, 'w')\ndef handle(data, context): return data\n"
    )
    (path / "model-config.yaml").write_text("parallelType: tp\ntorchrun: {nproc-per-node: 2, OMP_NUMBER_THREADS: 3}\n")
    return tmp_path / "store"


def start(environ: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """`minserve start` in a process of its own, for it takes signals and event loop with it."""
    command = [sys.executable, "-m", "minserve", "start", *map(str, arguments)]
    return subprocess.run(
        command,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=environ["MINSERVE_RUNTIME_DIR"],
    )


# ── what needs no server ──


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"minserve {minserve.__version__}\n"


def test_the_schema_in_configs_is_what_the_command_prints(run: Run) -> None:
    assert json.loads(run("schema").stdout) == json.loads(SCHEMA_COPY.read_text())


def test_check_prints_command_environment_endpoints_and_devices(run: Run, store: Path, environ: dict[str, str]) -> None:
    result = run("check", store / "m")
    assert result.exit_code == 0
    for line in (
        f"m: {store}/m",
        "ranks: 2",
        "workers: 1",
        f"    rank 1: unix:{environ['MINSERVE_RUNTIME_DIR']}/minserve-PID/m1/worker.1",
        "  devices: none",
        "    OMP_NUM_THREADS=3",
    ):
        assert line in result.stdout.splitlines()
    assert f"  command: {sys.executable} -m torch.distributed.run --nnodes 1 --nproc-per-node 2 " in result.stdout
    assert not (store.parent / "loaded").exists()
    assert os.listdir(environ["MINSERVE_RUNTIME_DIR"]) == []


def test_check_prints_warnings_and_goes_on(run: Run, store: Path) -> None:
    (store / "m" / "model-config.yaml").write_text("torchrun: {nproc-per-node: 2}\n")
    result = run("check", store / "m")
    assert result.exit_code == 0
    assert "warning: " in result.stderr
    assert "torchrun without a parallelType" in result.stderr


def test_check_prints_all_errors_and_exits_with_1(run: Run, store: Path) -> None:
    (store / "m" / "model-config.yaml").write_text('batchSize: "4"\nminWorkers: true\nmaxWorkerz: 1\n')
    result = run("check", store / "m")
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split(":")[1:3] for line in lines] == [["1", " batchSize"], ["2", " minWorkers"], ["3", " maxWorkerz"]]
    assert "did you mean maxWorkers?" in lines[2]


@pytest.mark.parametrize("trailing", ["", "/", "/."])
def test_check_takes_the_folders_name_however_it_is_spelt(
    run: Run, store: Path, trailing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store)
    assert run("check", f"m{trailing}").stdout.startswith(f"m: {store}/m\n")


def test_check_of_nothing_is_an_error(run: Run, tmp_path: Path) -> None:
    result = run("check", tmp_path / "none")
    assert result.exit_code == 1
    assert "no such directory" in result.stderr


def test_check_takes_the_servers_options(run: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("default_response_timeout: 7\n")
    assert "responseTimeout: 7 s" in run("check", store / "m", "--config", tmp_path / "server.yaml").stdout
    (tmp_path / "server.yaml").write_text("default_responce_timeout: 7\n")
    result = run("check", store / "m", "--config", tmp_path / "server.yaml")
    assert result.exit_code == 1
    assert "did you mean default_response_timeout?" in result.stderr


# ── start ──


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--inference-port", "70000"),
            "command line: inference_port: found 70000 (an integer), "
            "allowed: an integer from 0 to 65535; 0 picks a free port",
        ),
        (
            ("--log-level", "loud"),
            'command line: log_level: found "loud" (a string), allowed: "debug" or "info" or "warning" or "error"',
        ),
        (
            ("--config", "/none.yaml"),
            "/none.yaml: found a file that cannot be read (No such file or directory), allowed: a readable file",
        ),
    ],
)
def test_start_refuses_wrong_options(run: Run, arguments: tuple[str, ...], message: str) -> None:
    result = run("start", *arguments)
    assert (result.exit_code, result.stderr) == (1, f"minserve: {message}\n")


def test_start_passes_on_what_the_command_line_says(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[object] = []
    monkeypatch.setattr("minserve.cli._serve", lambda *arguments: served.extend(arguments))
    (tmp_path / "server.yaml").write_text("host: 0.0.0.0\njob_queue_size: 7\ninference_port: 1\n")
    arguments = "--model-store S --models a,b=c --models d e --inference-port 2 --management-port 3 --log-level DEBUG "
    arguments += "--log-file f --reload"
    assert run("start", "--config", tmp_path / "server.yaml", *arguments.split()).exit_code == 0
    from minserve.config.server import ServerOptions

    assert served == [
        ServerOptions(
            model_store="S",
            load_models=["a", "b=c", "d", "e"],
            host="0.0.0.0",
            inference_port=2,
            management_port=3,
            job_queue_size=7,
            log_level="debug",
            reload=True,
        ),
        Path("f"),
    ]


def test_the_environment_sets_the_log_level(environ: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setattr("minserve.cli._serve", lambda options, _: served.append(options.log_level))
    environ["MINSERVE_LOG_LEVEL"] = "warning"
    run("start")
    run("start", "--log-level", "error")
    assert served == ["warning", "error"]


def test_start_without_a_store_is_one_line_and_exit_1(environ: dict[str, str]) -> None:
    result = start(environ, "--model-store", "/nonexistent")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "minserve: model store /nonexistent: no such directory\n"
    assert os.listdir(environ["MINSERVE_RUNTIME_DIR"]) == []


def test_start_without_a_valid_model_says_what_is_wrong_and_exits_with_1(environ: dict[str, str], store: Path) -> None:
    (store / "m" / "model-config.yaml").write_text("batchSize: true\n")
    result = start(environ, "--model-store", store)
    assert (result.returncode, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"minserve: no model with a valid configuration in {store}: ")
    assert "batchSize: found true" in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--inference-port", "--management-port", "--metrics-port"])
def test_start_on_a_taken_port_is_one_line_and_no_rank(environ: dict[str, str], store: Path, option: str) -> None:
    others = {"--inference-port", "--management-port", "--metrics-port"} - {option}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = start(
            environ, "--model-store", store, option, port, *(part for other in others for part in (other, 0))
        )
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line == f"minserve: cannot listen on 127.0.0.1:{port}: Address already in use; {option} chooses another"
    assert not (store.parent / "loaded").exists()
    assert os.listdir(environ["MINSERVE_RUNTIME_DIR"]) == []


def test_what_a_failed_start_has_logged_stands_before_the_reason(environ: dict[str, str], store: Path) -> None:
    (store / "m" / "model-config.yaml").write_text("batchSize: true\n")
    (store / "n").mkdir()
    result = start(environ, "--model-store", store, "--log-file", "log")
    (line,) = result.stderr.splitlines()
    assert line.startswith("minserve: no model with a valid configuration")
    assert "n: skipped" in (Path(environ["MINSERVE_RUNTIME_DIR"]) / "log").read_text()
    result = start(environ, "--model-store", store)
    assert ["skipped" in line for line in result.stderr.splitlines()] == [True, False]


@pytest.mark.parametrize("detach", [(), ("--detach",)])
def test_a_log_file_that_cannot_be_written_is_one_line(environ: dict[str, str], detach: tuple[str, ...]) -> None:
    result = start(environ, *detach, "--log-file", "none/log")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "minserve: --log-file none/log: No such file or directory\n"


def test_a_detached_start_that_fails_says_why_also_when_the_log_was_full(environ: dict[str, str]) -> None:
    folder = Path(environ["MINSERVE_RUNTIME_DIR"])
    (folder / "server.yaml").write_text("log_max_bytes: 100\n")
    (folder / "store" / "empty").mkdir(parents=True)
    (folder / "minserve.log").write_text("x" * 1000)
    result = start(environ, "--detach", "--model-store", "store", "--config", "server.yaml")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "minserve: no model with a valid configuration in store: there is none"
    assert (folder / "minserve.log.1").read_text() == "x" * 1000


def test_a_detached_start_that_fails_says_why(environ: dict[str, str]) -> None:
    result = start(environ, "--detach", "--model-store", "/nonexistent")
    assert result.returncode == 1
    assert result.stderr == "minserve: model store /nonexistent: no such directory\n"


# ── stop ──

LIVE = """
import os, signal, sys
from minserve.worker.runtime import LiveServer, RuntimeDirectory
for number in map(int, sys.argv[1:]):
    signal.signal(number, signal.SIG_IGN)
runtime = RuntimeDirectory(os.environ)
runtime.tell(LiveServer(os.getpid(), "http://127.0.0.1:1", "http://127.0.0.1:2"))
print("up", flush=True)
signal.pause()
"""


@pytest.fixture
def live(environ: dict[str, str]) -> Iterator[Callable[..., int]]:
    """Starts a process that looks like a server and ignores these signals."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*ignored: signal.Signals) -> int:
        command = [sys.executable, "-c", LIVE, *(str(number.value) for number in ignored)]
        process = subprocess.Popen(command, env=os.environ | environ, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        return process.pid

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_stop_without_a_server_says_so(run: Run) -> None:
    result = run("stop")
    assert (result.exit_code, result.stdout) == (0, "minserve: no server is running\n")


def test_stop_ends_the_server_that_runs(run: Run, live: Callable[..., int]) -> None:
    pid = live()
    result = run("stop")
    assert (result.exit_code, result.stdout) == (0, f"minserve: stopped pid {pid}\n")
    assert run("stop").stdout == "minserve: no server is running\n"


def test_of_several_servers_one_must_be_chosen(run: Run, live: Callable[..., int]) -> None:
    one, two = live(), live()
    result = run("stop")
    assert result.exit_code == 1
    assert f"{one} (http://127.0.0.1:1)" in result.stderr
    assert f"{two} (http://127.0.0.1:1)" in result.stderr
    assert run("stop", "--pid", two).stdout == f"minserve: stopped pid {two}\n"
    os.kill(one, signal.SIGCONT)  # it lives
    assert run("stop", "--pid", two).stdout == f"minserve: no server with pid {two}\n"


def test_a_server_that_does_not_end_is_told(run: Run, live: Callable[..., int]) -> None:
    pid = live(signal.SIGTERM)
    result = run("stop", "--timeout", "0.1")
    assert (result.exit_code, result.stderr) == (1, f"minserve: pid {pid} still runs after 0.1 s\n")


def test_stop_now_sends_a_second_signal(run: Run, live: Callable[..., int]) -> None:
    pid = live(signal.SIGTERM)
    result = run("stop", "--now")
    assert (result.exit_code, result.stdout) == (0, f"minserve: stopped pid {pid}\n")


# ── status ──


@pytest.fixture
def management(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A server with two pages of models; the URLs that were asked for."""
    asked: list[str] = []
    worker = {"id": "0", "state": "READY", "restarts": 0, "ranks": []}
    event = {"time": "2023", "worker": 0, "rank": None, "pid": 0, "kind": "restart", "detail": "in 1 s", "count": 2}

    def get(client: Client, path: str) -> object:
        asked.append(client.url + path)
        path = path.removeprefix("/models")
        if path.startswith("?"):
            page: dict[str, object] = {"models": [{"modelName": "a" if path.endswith("=0") else "b"}]}
            return page | ({"nextPageToken": "1"} if path.endswith("=0") else {})
        if path.endswith("/events?limit=5"):
            return {"schema": 1, "model": path.split("/")[1], "events": [event | {"model": path.split("/")[1]}]}
        return [{"modelName": path.split("/")[1], "modelVersion": "1.0", "workers": [worker]}]

    monkeypatch.setattr("minserve.cli._get", get)
    return asked


def test_status_shows_every_model_of_every_page(run: Run, management: list[str]) -> None:
    result = run("status", "--url", "http://there:9")
    assert result.exit_code == 0
    assert management == [
        "http://there:9/models?next_page_token=0",
        "http://there:9/models?next_page_token=1",
        "http://there:9/models/a/all",
        "http://there:9/models/a/1.0/events?limit=5",
        "http://there:9/models/b/all",
        "http://there:9/models/b/1.0/events?limit=5",
    ]
    assert [line.split("│")[1].strip() for line in result.stdout.splitlines() if "READY" in line] == ["a", "b"]


def test_status_as_json_is_what_management_says(run: Run, management: list[str]) -> None:
    described = json.loads(run("status", "--json", "--url", "http://there:9").stdout)
    assert [model["modelName"] for model in described] == ["a", "b"]
    assert [model["events"][0]["detail"] for model in described] == ["in 1 s", "in 1 s"]


def test_status_asks_the_server_that_runs_here(run: Run, management: list[str], live: Callable[..., int]) -> None:
    assert run("status").exit_code == 0
    live()
    assert run("status").exit_code == 0
    assert [url for url in management if url.endswith("=0")] == [
        "http://127.0.0.1:8081/models?next_page_token=0",
        "http://127.0.0.1:2/models?next_page_token=0",
    ]


def test_status_without_a_server_is_one_line_and_exit_1(run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refused
        port = unused.getsockname()[1]
        result = run("status", "--url", f"http://127.0.0.1:{port}")
    assert result.exit_code == 1
    assert result.stderr == f"minserve: no answer from http://127.0.0.1:{port}: [Errno 111] Connection refused\n"


# ── record, replay ──


def test_a_recording_that_is_there_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recording.1").write_text("precious")
    result = run("record", "m", tmp_path / "recording", "--url", "http://127.0.0.1:1")
    assert (result.exit_code, result.stderr) == (
        1,
        f"minserve: {tmp_path / 'recording.1'} is there already; remove it, or choose another name\n",
    )


def test_recording_without_a_server_leaves_no_file(run: Run, tmp_path: Path) -> None:
    result = run("record", "m", tmp_path / "recording", "--url", "http://127.0.0.1:1")
    assert (result.exit_code, result.stderr) == (1, "minserve: http://127.0.0.1:1: Connection refused\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """One batch of one request, of a worker of two ranks."""
    path = tmp_path / "recording"
    meta = RequestMeta("id", (), (Part("body", "", 2),))
    records: list[AnyRecord] = [
        Header("0.1.0", "m", "1.0", "m/0", 2, 4, False, 1.0),
        Sent("m-0-a", 7, 1.0, (meta,), None),
    ]
    path.write_bytes(MAGIC + b"".join(map(encode, records)))
    return path


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--seq", "one"), "seq: found 'one', allowed: A:B, A:, :B or A, with numbers of batches"),
        (("--seq", "8:"), "seq: found no batch of that range in m-0-a, allowed: batches 7 to 7"),
        (("--nproc", "0"), "nproc: found 0, allowed: an integer >= 1"),
    ],
)
def test_what_cannot_be_played_is_told_before_anything_starts(
    run: Run, store: Path, recording: Path, tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    result = run("replay", recording, store / "m", *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"minserve: {told}"
    assert not (tmp_path / "loaded").exists()


def test_a_replay_of_no_recording_or_into_no_model_is_told(run: Run, store: Path, recording: Path) -> None:
    result = run("replay", store / "m" / "handler.py", store / "m")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "not a recording of minserve" in result.stderr
    result = run("replay", recording, store / "none")
    assert result.exit_code == 1
    assert "no such directory" in result.stderr
