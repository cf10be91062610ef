import os
import signal
from collections.abc import Callable

from typer.testing import Result

Run = Callable[..., Result]


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
