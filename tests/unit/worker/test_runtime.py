import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from minserve.errors import StartupError
from minserve.worker.endpoints import unix_endpoints
from minserve.worker.runtime import (
    MARKER,
    UNIX_PATH_BYTES,
    LiveServer,
    RuntimeDirectory,
    _remove_stale,
    live_servers,
    runtime_root,
)

HERE = LiveServer(4711, "http://127.0.0.1:8080", "http://127.0.0.1:8081")


@pytest.fixture
def environ(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    root = tmp_path_factory.mktemp("r")  # short: a unix address has 107 bytes
    # MINSERVE_RUNTIME_DIR keeps these tests away from servers that really run here.
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/nonexistent")
    return {"XDG_RUNTIME_DIR": "/nonexistent", "MINSERVE_RUNTIME_DIR": str(root)}


@pytest.fixture
def root(environ: Mapping[str, str]) -> Path:
    return Path(environ["MINSERVE_RUNTIME_DIR"])


@pytest.fixture
def runtime(environ: Mapping[str, str]) -> Iterator[RuntimeDirectory]:
    runtime = RuntimeDirectory(environ)
    yield runtime
    if runtime.path.exists():
        runtime.remove()


@pytest.fixture
def another(root: Path) -> Iterator[Path]:
    """The directory of another server that lives."""
    path = root / "minserve-1"
    path.mkdir()
    (path / MARKER).touch()
    lock = os.open(path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield path
    os.close(lock)


def test_it_is_private_and_named_after_the_server(runtime: RuntimeDirectory, root: Path) -> None:
    assert runtime.path == root / f"minserve-{os.getpid()}"
    model = runtime.new_model_directory()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (runtime.path, model)] == [0o700, 0o700]


def test_each_model_version_has_a_directory_with_a_short_name(runtime: RuntimeDirectory) -> None:
    paths = [runtime.new_model_directory() for _ in range(3)]
    assert [path.name for path in paths] == ["m1", "m2", "m3"]
    assert all(path.is_dir() for path in paths)


def test_a_model_version_that_has_gone_leaves_no_directory_and_no_name(runtime: RuntimeDirectory) -> None:
    first, second = runtime.new_model_directory(), runtime.new_model_directory()
    runtime.drop_model_directory(first)
    assert not first.exists()
    runtime.restore()
    assert not first.exists()
    assert runtime.new_model_directory() not in (first, second)


def test_what_archives_hold_lies_beside_it_private_and_locked_and_goes_with_it(
    environ: Mapping[str, str], root: Path
) -> None:
    runtime = RuntimeDirectory(environ)
    assert not runtime.models.exists(), "it is made when it is needed"
    first, second = runtime.new_extraction(), runtime.new_extraction()
    assert first.parent == second.parent == runtime.models == root / f"minserve-{os.getpid()}.models"
    assert first != second
    assert not first.exists()
    assert stat.S_IMODE(runtime.models.stat().st_mode) == 0o700
    first.mkdir()
    _remove_stale(root)  # what another server does that starts
    assert first.exists()
    shutil.rmtree(runtime.models)
    assert runtime.new_extraction().parent.is_dir(), "somebody has cleaned up"
    runtime.remove()
    assert not runtime.models.exists()


def test_what_archives_of_a_dead_server_held_is_removed(environ: Mapping[str, str], root: Path) -> None:
    left = root / "minserve-999999.models"
    (left / "x1").mkdir(parents=True)
    (left / MARKER).touch()
    RuntimeDirectory(environ).remove()
    assert not left.exists()


def test_it_is_gone_with_the_server(runtime: RuntimeDirectory, root: Path) -> None:
    (runtime.new_model_directory() / "worker.0").touch()
    runtime.remove()
    assert list(root.iterdir()) == []


def test_a_start_removes_what_dead_servers_left_and_nothing_else(
    environ: Mapping[str, str], root: Path, another: Path
) -> None:
    dead = root / "minserve-2"
    (dead / "m1").mkdir(parents=True)
    (dead / MARKER).touch()
    (root / "minserve-3").mkdir()  # without the marker nobody knows whose it is
    elsewhere = root / "precious"
    elsewhere.mkdir()
    (elsewhere / MARKER).touch()
    (root / "minserve-4").symlink_to(elsewhere)
    runtime = RuntimeDirectory(environ)
    assert sorted(path.name for path in root.iterdir()) == sorted(
        ["minserve-1", "minserve-3", "minserve-4", "precious", runtime.path.name]
    )
    assert (elsewhere / MARKER).exists()
    runtime.remove()


def test_what_another_server_removes_meanwhile_is_no_error(
    environ: Mapping[str, str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`minserve stop` looks while the server takes its directory away; two servers may clean up at once."""
    (root / "minserve-2").mkdir()
    real = Path.glob

    def racing(path: Path, pattern: str) -> list[Path]:
        found = list(real(path, pattern))
        shutil.rmtree(root / "minserve-2", ignore_errors=True)
        return found

    monkeypatch.setattr(Path, "glob", racing)
    assert live_servers(environ) == []
    RuntimeDirectory(environ).remove()


def test_servers_that_listen_are_found(runtime: RuntimeDirectory, another: Path, environ: Mapping[str, str]) -> None:
    assert live_servers(environ) == [], "neither listens yet"
    runtime.tell(HERE)
    assert live_servers(environ) == [HERE]
    (another / "server.json").write_text('{"pid": 1, "inference": "http://a", "management": "http://b"}')
    assert sorted(server.pid for server in live_servers(environ)) == [1, 4711]


@pytest.mark.parametrize("note", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "inference": "", "management": "", "x": 0}'])
def test_a_note_that_cannot_be_read_is_no_server(another: Path, environ: Mapping[str, str], note: str) -> None:
    (another / "server.json").write_text(note)
    assert live_servers(environ) == []


def test_a_dead_servers_note_is_no_server(environ: Mapping[str, str], root: Path) -> None:
    (root / "minserve-2").mkdir()
    (root / "minserve-2" / MARKER).touch()
    (root / "minserve-2" / "server.json").write_text('{"pid": 2, "inference": "http://a", "management": "http://b"}')
    assert live_servers(environ) == []


def test_what_a_server_of_our_pid_left_half_removed_is_removed(environ: Mapping[str, str], root: Path) -> None:
    """In a container every server has the same pid."""
    (root / f"minserve-{os.getpid()}" / "m1").mkdir(parents=True)
    runtime = RuntimeDirectory(environ)
    assert [path.name for path in runtime.path.iterdir()] == [MARKER]
    runtime.remove()


def test_a_directory_that_is_taken_is_a_startup_error(environ: Mapping[str, str], root: Path) -> None:
    (root / f"minserve-{os.getpid()}").write_text("a file of somebody's")
    for _ in range(2):  # the first leaves nothing that would stand in the way of the second
        with pytest.raises(StartupError, match=r"cannot create the runtime directory .*: Not a directory"):
            RuntimeDirectory(environ)
    (root / f"minserve-{os.getpid()}").unlink()
    RuntimeDirectory(environ).remove()


def test_servers_are_found_wherever_they_may_have_been_started(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path_factory.mktemp("b"), tmp_path_factory.mktemp("t")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(second))
    by_cron = RuntimeDirectory({})
    by_cron.tell(HERE)
    environ = {"XDG_RUNTIME_DIR": str(first)}
    assert by_cron.path.parent == second
    assert HERE in live_servers(environ)
    assert live_servers({"MINSERVE_RUNTIME_DIR": str(first)}) == [], "the one place that was named"
    by_cron.remove()
    assert HERE not in live_servers(environ)


def test_a_directory_that_was_removed_is_made_anew_with_all_that_a_start_needs(
    runtime: RuntimeDirectory, environ: Mapping[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    models = [runtime.new_model_directory() for _ in range(2)]
    runtime.tell(HERE)
    shutil.rmtree(runtime.path)
    assert live_servers(environ) == []
    runtime.restore()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (runtime.path, *models)] == [0o700] * 3
    assert live_servers(environ) == [HERE]
    assert caplog.messages == [f"the runtime directory {runtime.path} was removed; it has been made anew"]
    runtime.restore()
    assert len(caplog.messages) == 1, "nothing is missing"


def test_what_a_cleaner_of_old_files_has_taken_is_made_anew(
    runtime: RuntimeDirectory, environ: Mapping[str, str]
) -> None:
    model = runtime.new_model_directory()
    runtime.tell(HERE)
    (model / "worker.0").touch()
    (runtime.path / "server.json").unlink()
    (runtime.path / MARKER).unlink()
    runtime.restore()
    assert live_servers(environ) == [HERE]
    assert (runtime.path / MARKER).exists()
    assert (model / "worker.0").exists()


def test_a_directory_that_cannot_be_made_anew_is_named(
    runtime: RuntimeDirectory, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(root)  # the login session has ended
    for _ in range(2):
        runtime.restore()
    assert caplog.messages[-1].startswith(
        f"the runtime directory {runtime.path} cannot be made anew, no worker can start: [Errno 2]"
    )
    runtime.remove()
    root.mkdir()


def test_it_is_locked_itself_so_that_systemd_spares_it(runtime: RuntimeDirectory) -> None:
    directory = os.open(runtime.path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(directory)


@pytest.mark.parametrize("unfit", ["", "/nonexistent", "a file", "a long name", "read-only"])
def test_the_temp_folder_serves_where_there_is_no_fit_runtime_directory(
    unfit: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, temp = tmp_path_factory.mktemp("b"), tmp_path_factory.mktemp("t")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(temp))
    match unfit:
        case "a file":
            (base / "f").touch()
            unfit = str(base / "f")
        case "a long name":
            (base / ("x" * 60)).mkdir()
            unfit = str(base / ("x" * 60))
        case "read-only":
            unfit = "/proc/self"
    assert runtime_root({"XDG_RUNTIME_DIR": unfit} if unfit else {}) == temp


def test_the_longest_name_fits_a_unix_address(tmp_path_factory: pytest.TempPathFactory) -> None:
    longest = None
    for length in range(1, 100):
        path = tmp_path_factory.getbasetemp() / ("d" * length)
        path.mkdir()
        if runtime_root({"XDG_RUNTIME_DIR": str(path)}) == path:
            longest = path
        else:
            break
    assert longest is not None
    (last,) = unix_endpoints(longest / "minserve-4194304" / "m999", 99999, 1).addresses
    assert len(last.removeprefix("unix:")) <= UNIX_PATH_BYTES


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "none of XDG_RUNTIME_DIR, TMPDIR and /tmp is writable and short$"),
        ({"MINSERVE_RUNTIME_DIR": "/usr"}, "MINSERVE_RUNTIME_DIR=/usr is not writable and short$"),
        ({"MINSERVE_RUNTIME_DIR": "run"}, "MINSERVE_RUNTIME_DIR=run is not writable and short$"),
    ],
)
def test_without_any_place_the_error_names_the_candidates(
    environ: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StartupError, match=message):
        runtime_root(environ)


def test_a_servers_note_leads_to_its_management_key(tmp_path: Path) -> None:
    file = tmp_path / "key_file.json"
    assert replace(HERE, key_file=str(file)).management_key() == "", "it has gone"
    file.write_text('{"management": {"key": "k"}}')
    assert replace(HERE, key_file=str(file)).management_key() == "k"
    assert HERE.management_key() == ""
