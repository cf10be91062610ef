import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.unit.cli.starting import start

Run = Callable[..., Result]


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
    monkeypatch.setattr("minserve.cli.start._serve", lambda *arguments: served.extend(arguments))
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
    monkeypatch.setattr("minserve.cli.start._serve", lambda options, _: served.append(options.log_level))
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
