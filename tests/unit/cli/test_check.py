import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]


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


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os\ndef handle(data, context:\n", ":2: found a syntax error ('(' was never closed), allowed: Python"),
        ("def handle(data, context): pass\0", "found a syntax error (source code string cannot contain null bytes)"),
    ],
)
def test_check_finds_a_handler_that_is_no_python(run: Run, store: Path, code: str, error: str) -> None:
    (store / "m" / "handler.py").write_text(code)
    result = run("check", store / "m")
    assert result.exit_code == 1
    assert f"{store}/m/handler.py" in result.stderr
    assert error in result.stderr


def test_check_of_a_file_that_is_no_archive_says_what_is_allowed(run: Run, store: Path) -> None:
    result = run("check", store / "m" / "handler.py")
    assert result.exit_code == 1
    assert (
        "handler.py: found a file, allowed: a model directory or an archive (.tar.gz, .tgz, .mar, .model, .zip)"
        in result.stderr
    )


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
