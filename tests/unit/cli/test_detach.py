from pathlib import Path

from tests.unit.cli.starting import start


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
