from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from minserve.errors import WireError
from minserve.rank import process
from minserve.rank.process import Launch, configure_logging, read_environment, redirect_output


def environment(**changes: str) -> dict[str, str]:
    """Rank 3 of a worker whose first endpoint is 8."""
    return {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MINSERVE_ENDPOINT": "unix:/run/m/worker.",
        "MINSERVE_BASE": "8",
        "MINSERVE_WORKER": "w2",
        "MINSERVE_SECRET": "hush",
        "MINSERVE_DIRECTORY": "/run/m/0.r",
        **changes,
    }


def test_the_launch_is_read_from_the_environment() -> None:
    assert read_environment(environment()) == Launch(
        rank=3,
        local_rank=1,
        world_size=4,
        endpoint="unix:/run/m/worker.9",
        worker="w2",
        secret="hush",
        directory=Path("/run/m/0.r"),
        debug=False,
    )


@pytest.mark.parametrize(
    ("prefix", "base", "endpoint"),
    [("unix:/run/m/worker.", "0", "unix:/run/m/worker.1"), ("tcp:127.0.0.1:", "45678", "tcp:127.0.0.1:45679")],
)
def test_the_endpoint_counts_from_the_base_by_local_rank(prefix: str, base: str, endpoint: str) -> None:
    assert read_environment(environment(MINSERVE_ENDPOINT=prefix, MINSERVE_BASE=base)).endpoint == endpoint


def test_the_secret_is_removed_and_nothing_else() -> None:
    environ = environment()
    before = dict(environ)
    read_environment(environ)
    del before["MINSERVE_SECRET"]
    assert environ == before


@pytest.mark.parametrize(("level", "debug"), [("debug", True), ("info", False), ("", False)])
def test_only_the_debug_level_is_debug(level: str, debug: bool) -> None:
    assert read_environment(environment(MINSERVE_LOG_LEVEL=level)).debug is debug


@pytest.mark.parametrize("name", sorted(environment()))
def test_a_missing_variable_is_named(name: str) -> None:
    environ = environment()
    del environ[name]
    with pytest.raises(KeyError, match=name):
        read_environment(environ)


def test_a_rank_does_not_wait_for_a_server_that_is_gone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "output.0")
    with pytest.raises(OSError, match="No such device"):
        redirect_output(read_environment(environment(MINSERVE_DIRECTORY=str(tmp_path), LOCAL_RANK="0")))


def test_stdout_and_stderr_go_to_the_ranks_own_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "output.0"
    output.touch()
    duplicated: list[tuple[str, int]] = []
    opened: list[int] = []

    def dup2(fd: int, onto: int) -> None:
        duplicated.append((os.readlink(f"/proc/self/fd/{fd}"), onto))
        opened.append(fd)

    monkeypatch.setattr(os, "dup2", dup2)
    redirect_output(Launch(0, 0, 1, "", "", "", tmp_path, False))
    assert duplicated == [(str(output), 1), (str(output), 2)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])  # not left open beside the two


@pytest.mark.parametrize("debug", [True, False])
def test_debug_reaches_minserves_loggers_alone(debug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    ours = logging.getLogger("minserve")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    configure_logging(Launch(0, 0, 1, "", "", "", Path(), debug))
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]  # levels were set around the logging module
    assert logging.getLogger("minserve.rank.loop").isEnabledFor(logging.DEBUG) is debug
    assert not logging.getLogger("a_handler").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("a_handler").isEnabledFor(logging.INFO)


@pytest.mark.parametrize(("environ", "line"), [({}, "INFO a_handler: {}\n"), ({"MINSERVE_BARE_LOG": "1"}, "{}\n")])
def test_a_log_line_is_the_message_alone_where_torchserves_form_is_asked_for(
    environ: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    configure_logging(read_environment(environment(**environ)))
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]
    logging.getLogger("a_handler").info("{}")
    assert capsys.readouterr().out == line


class FakeConnection:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def connect(self, address: object) -> None:
        self.calls.append(("connect", address))

    def setsockopt(self, *option: object) -> None:
        self.calls.append(option)


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("unix:/run/m/worker.9", "/run/m/worker.9"),
        ("unix:/run/odd:name/worker.0", "/run/odd:name/worker.0"),
        ("tcp:127.0.0.1:4567", ("127.0.0.1", 4567)),
        ("tcp:::1:4567", ("::1", 4567)),
    ],
)
def test_the_endpoint_says_where_to_connect(endpoint: str, address: object, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeConnection()

    def create_connection(address: object) -> FakeConnection:
        fake.connect(address)
        return fake

    monkeypatch.setattr("socket.socket", lambda family, kind: fake)
    monkeypatch.setattr("socket.create_connection", create_connection)
    connection: object = process.connect(Launch(0, 0, 1, endpoint, "", "", Path(), False))
    assert connection is fake
    assert fake.calls[0] == ("connect", address)
    assert len(fake.calls) == (2 if endpoint.startswith("tcp:") else 1)  # TCP_NODELAY


class Ended(BaseException):
    """In place of `os._exit`."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which the process would have ended at once."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    return codes


@pytest.mark.parametrize("code", [0, 1])
def test_a_rank_that_ends_in_order_returns_its_code(code: int, ends: list[int]) -> None:
    assert process.run_to_the_end(lambda: code) == code
    assert ends == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemExit(7), 7),
        (SystemExit(), 0),
        (SystemExit("no weights"), 1),
        (KeyboardInterrupt(), 1),
        (WireError("not a minserve frame"), 1),
    ],
)
def test_what_flies_out_of_a_rank_ends_the_process_at_once_and_leaves_its_traceback(
    error: BaseException, code: int, ends: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise error

    with pytest.raises(Ended):
        process.run_to_the_end(run)
    assert ends == [code]
    assert type(error).__name__ in capsys.readouterr().err
