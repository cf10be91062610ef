"""Each thing that is done to a fork, in a process that it may be done to."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from minserve.rank.forked import Origin


@pytest.fixture
def origin(monkeypatch: pytest.MonkeyPatch) -> Origin:
    monkeypatch.setenv("PYTHONPATH", "/a")
    return Origin()


def changed(origin: Origin, **changes: str) -> Mapping[str, str]:
    return {**origin.environ, **changes}


def run(code: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "MINSERVE_ROOM": "-" * 300, **(environ or {})}
    prelude = "import os, signal, sys\nfrom minserve.rank import forked\norigin = forked.Origin()\n"
    command = [sys.executable, "-c", prelude + code]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"MINSERVE_WORKER": "m-0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        {"OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "3", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": "/b"},
    ],
)
def test_what_minserve_sets_may_be_another(origin: Origin, changes: dict[str, str], tmp_path: Path) -> None:
    assert origin.why_not(changed(origin, **changes), str(tmp_path)) == ""


@pytest.mark.parametrize("name", ["TORCH_LOGS", "LD_PRELOAD", "OMP_PROC_BIND", "MY_RANK"])
def test_what_may_have_been_read_already_must_be_the_same(origin: Origin, name: str, tmp_path: Path) -> None:
    assert name in origin.why_not(changed(origin, **{name: "another"}), str(tmp_path))
    without = {key: value for key, value in origin.environ.items() if key != "PATH"}
    assert "PATH" in origin.why_not(without, str(tmp_path))


@pytest.mark.parametrize(
    ("file", "hides"),
    [
        ("json.py", "json"),
        ("msgspec/__init__.py", "msgspec"),
        ("json.cpython-311-x86_64-linux-gnu.so", "json"),
        ("sitecustomize.py", "sitecustomize"),
        ("handler.py", ""),
        ("json/data.txt", ""),
        ("json.yaml", ""),
    ],
)
def test_a_module_that_hides_one_that_is_loaded_needs_a_process_of_its_own(
    origin: Origin, tmp_path: Path, file: str, hides: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    expected = f"{tmp_path} has a {hides} of its own" if hides else ""
    assert origin.why_not(origin.environ, str(tmp_path)) == expected
    assert origin.why_not(changed(origin, PYTHONPATH=f"/a:{tmp_path}"), "/") == expected


def test_the_path_is_that_of_a_python_in_that_directory(tmp_path: Path) -> None:
    path = f"/b:{tmp_path}:c"
    code = f"os.chdir({str(tmp_path)!r}); origin.set_path({{'PYTHONPATH': {path!r}}}, {str(tmp_path)!r})"
    forked = run(f"{code}; print(sys.path)", {"PYTHONPATH": "/a"})
    (tmp_path / "say.py").write_text("import sys; print(sys.path)")
    environ = {**os.environ, "PYTHONPATH": path}
    plain = subprocess.run(
        [sys.executable, "-m", "say"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    assert forked.stdout == plain.stdout


def test_the_environment_is_replaced_for_all_that_look_at_it_but_shows_no_secret() -> None:
    environ = {"MINSERVE_WORKER": "m-0-ab", "MINSERVE_DIRECTORY": "/run/m", "MINSERVE_SECRET": "s", "A": "1"}
    code = f"origin.replace_environment({environ!r})\n"
    code += "import json, subprocess\n"
    code += "shown = open('/proc/self/environ').read().rstrip('\\0').split('\\0')\n"
    code += "given = subprocess.run(['/usr/bin/env'], capture_output=True, text=True).stdout.split()\n"
    code += "print(json.dumps([dict(os.environ), shown, given]))"
    ours, shown, given = json.loads(run(code).stdout)
    assert ours == environ
    assert sorted(given) == sorted(f"{name}={value}" for name, value in environ.items())
    assert sorted(shown) == ["A=1", "MINSERVE_DIRECTORY=/run/m", "MINSERVE_WORKER=m-0-ab"]


def test_marks_are_shown_also_where_there_is_no_room_for_all() -> None:
    environ = {f"V{number}": "x" * 1000 for number in range(100)} | {
        "MINSERVE_WORKER": "m-0",
        "MINSERVE_DIRECTORY": "/r",
    }
    code = f"origin.replace_environment({environ!r})\nprint(open('/proc/self/environ').read()[:41].split('\\0'))"
    assert run(code).stdout == "['MINSERVE_WORKER=m-0', 'MINSERVE_DIRECTORY=/r']\n"


def test_signals_are_as_at_the_start_of_python() -> None:
    code = "before = {n: signal.getsignal(n) for n in signal.Signals}\n"
    code += "signal.signal(signal.SIGTERM, print); signal.signal(signal.SIGINT, print)\n"
    code += "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\nforked.reset_signals()\n"
    code += "print({n: signal.getsignal(n) for n in signal.Signals} == before, signal.pthread_sigmask(0, []))"
    assert run(code).stdout == "True set()\n"


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('no weights')", 1, "no weights\n"),
        ("raise ValueError('no weights')", 1, "ValueError: no weights\n"),
    ],
)
def test_a_fork_ends_as_a_process_does(body: str, code: int, text: str) -> None:
    script = "import atexit\natexit.register(print, 'tidied up')\n"
    ended = run(f"{script}def main():\n    {body}\ntry:\n    forked.leave(main)\nfinally:\n    print('above')")
    assert (ended.returncode, ended.stdout) == (code, "tidied up\n")
    assert ended.stderr.endswith(text)


def test_a_rank_that_could_not_use_cuda_ends_at_once() -> None:
    """Else torch would tell it that there is no GPU, and it would be on the CPU."""
    ended = run("import torch\ntorch.cuda._is_in_bad_fork = lambda: True\nforked.leave(forked.run_rank)")
    assert ended.returncode == 1
    assert "CUDA was in use" in ended.stderr


def test_ps_shows_what_a_fork_is() -> None:
    code = "forked.show_module('m')\nprint(open('/proc/self/cmdline').read().rstrip(chr(0)).split(chr(0))[1:])"
    assert run(code).stdout == "['-u', '-m', 'm']\n"
