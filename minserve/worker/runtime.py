"""The server's private directory: sockets, log pipes and rendezvous files of its workers, gone when it ends."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minserve.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Mapping

# sun_path holds 108 bytes with the final zero. The longest name we put below the directory is "/m999/9999.r/worker.99999".
UNIX_PATH_BYTES = 107
_LONGEST_NAME = 32
SERVER_FILE = "server.json"  # what `minserve stop` and `minserve status` look for


class RuntimeDirectory:
    """`minserve-<pid>`, mode 0700, under XDG_RUNTIME_DIR or the temp folder.

    A lock held on it for life tells a live server's directory from a dead one's, whatever the pids say by then; creating
    one removes those of dead servers.

    Raises:
        StartupError: there is no place for it.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        root = runtime_root(environ)
        _remove_stale(root)
        self.path = root / f"minserve-{os.getpid()}"
        # Locked before it has its name: another server that starts just now must not take it for a dead one's.
        unnamed = root / f".{self.path.name}"
        shutil.rmtree(unnamed, ignore_errors=True)  # of a server with our pid that was killed on these lines
        if self.path.is_dir() and not (self.path / "lock").exists():
            shutil.rmtree(self.path, ignore_errors=True)  # or while it removed itself; a live one would have its lock
        try:
            unnamed.mkdir(mode=0o700)
            self._lock = os.open(unnamed / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            unnamed.rename(self.path)
        except OSError as error:
            raise StartupError(f"cannot create the runtime directory {self.path}: {error.strerror}") from None
        self._models = 0

    def new_model_directory(self) -> Path:
        """A directory for one model version. Short, for a unix address has 107 bytes and models have long names."""
        self._models += 1
        path = self.path / f"m{self._models}"
        path.mkdir(mode=0o700)
        return path

    def tell(self, server: LiveServer) -> None:
        """Leaves a note for `minserve stop` and `minserve status`."""
        note = self.path / "server.tmp"
        note.write_text(json.dumps(asdict(server)))
        note.replace(self.path / SERVER_FILE)

    def remove(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def runtime_root(environ: Mapping[str, str]) -> Path:
    """The folder in which this user's servers have their directories.

    Raises:
        StartupError: there is none.
    """
    candidates = [environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    for candidate in candidates:
        path = Path(candidate)
        short = len(os.fsencode(candidate)) + len("/minserve-4194304") + _LONGEST_NAME <= UNIX_PATH_BYTES
        # Absolute: the ranks look for the sockets from their model directory.
        if path.is_absolute() and short and path.is_dir() and os.access(path, os.W_OK | os.X_OK):
            return path
    raise StartupError(
        "no directory for the worker sockets: none of XDG_RUNTIME_DIR, TMPDIR and /tmp is writable and short"
    )


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server that runs, from the file that it leaves in its directory."""

    pid: int
    inference: str
    management: str


def live_servers(environ: Mapping[str, str]) -> list[LiveServer]:
    """This user's servers that listen, among those started with the same XDG_RUNTIME_DIR."""
    servers = []
    for path in _own_directories(runtime_root(environ)):
        lock = _try_lock(path)
        if lock is not None:
            os.close(lock)
            continue
        try:
            servers.append(LiveServer(**json.loads((path / SERVER_FILE).read_text())))
        except (OSError, ValueError, TypeError):
            continue  # it does not listen yet
    return servers


def _own_directories(root: Path) -> list[Path]:
    return [path for path in root.glob("minserve-*") if _is_own_directory(path)]


def _is_own_directory(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:  # its server, or another that starts, has just removed it
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _remove_stale(root: Path) -> None:
    for path in _own_directories(root):
        lock = _try_lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _try_lock(path: Path) -> int | None:
    """The lock of a dead server's directory; None when its server lives, or there is none."""
    try:
        lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
