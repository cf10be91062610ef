"""The server's private directory: sockets, log pipes and rendezvous files of its workers, gone when it ends."""

from __future__ import annotations

import fcntl
import json
import logging
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
MARKER = "minserve"  # a directory without it is none of ours, whatever its name
SERVER_FILE = "server.json"  # what `minserve stop` and `minserve status` look for

logger = logging.getLogger(__name__)


class RuntimeDirectory:
    """`minserve-<pid>`, mode 0700, under MINSERVE_RUNTIME_DIR, XDG_RUNTIME_DIR or the temp folder.

    A lock held on it for life tells a live server's directory from a dead one's, whatever the pids say by then; creating
    one removes those of dead servers. (systemd-tmpfiles, too, spares a directory that is locked, however old it is.)

    Attributes:
        models: the directory for what is extracted from archives, there once it is needed. In the temp folder unless
            MINSERVE_RUNTIME_DIR is set: XDG_RUNTIME_DIR is in memory as a rule, and models are large.

    Raises:
        StartupError: there is no place for it.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.path = runtime_root(environ) / f"minserve-{os.getpid()}"
        place = Path(environ.get("MINSERVE_RUNTIME_DIR") or tempfile.gettempdir())
        self.models = place / f"{self.path.name}.models"
        self._model_directories: list[Path] = []
        self._numbers = self._extractions = 0
        self._models_lock: int | None = None
        self._note: LiveServer | None = None
        for root in _roots(environ):
            _remove_stale(root)
        if self.path.is_dir() and not (self.path / MARKER).exists():
            shutil.rmtree(self.path, ignore_errors=True)  # of a server with our pid that was killed while it removed it
        try:
            self._lock = _create(self.path)
        except OSError as error:
            raise StartupError(f"cannot create the runtime directory {self.path}: {error.strerror}") from None

    def new_model_directory(self) -> Path:
        """A directory for one model version. Short, for a unix address has 107 bytes and models have long names."""
        self._numbers += 1
        path = self.path / f"m{self._numbers}"
        path.mkdir(mode=0o700)
        self._model_directories.append(path)
        return path

    def drop_model_directory(self, path: Path) -> None:
        """Removes the directory of a model version that has gone."""
        self._model_directories.remove(path)
        shutil.rmtree(path, ignore_errors=True)

    def new_extraction(self) -> Path:
        """A path, for the caller to make, for the files of one archive.

        Raises:
            StartupError: there is no place for it.
        """
        try:
            if not self.models.is_dir():
                if self._models_lock is not None:  # somebody has cleaned up; what was in it is extracted on a reload
                    os.close(self._models_lock)
                    self._models_lock = None
                self._models_lock = _create(self.models)
        except OSError as error:
            raise StartupError(f"cannot create {self.models} for the files of archives: {error.strerror}") from None
        self._extractions += 1
        return self.models / f"x{self._extractions}"

    def tell(self, server: LiveServer) -> None:
        """Leaves a note for `minserve stop` and `minserve status`."""
        self._note = server
        note = self.path / "server.tmp"
        note.write_text(json.dumps(asdict(server)))
        note.replace(self.path / SERVER_FILE)

    def restore(self) -> None:
        """Makes anew what is missing: somebody has cleaned up old files, or the login session has ended.

        Workers that run can do without, those that are started cannot. Errors are logged: the server goes on.
        """
        try:
            if not self.path.is_dir():
                before, self._lock = self._lock, _create(self.path)
                os.close(before)
                logger.warning("the runtime directory %s was removed; it has been made anew", self.path)
            (self.path / MARKER).touch()
            for path in self._model_directories:
                path.mkdir(mode=0o700, exist_ok=True)
            if self._note is not None and not (self.path / SERVER_FILE).exists():
                self.tell(self._note)
        except OSError as error:
            logger.error("the runtime directory %s cannot be made anew, no worker can start: %s", self.path, error)

    def remove(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        if self._models_lock is not None:
            shutil.rmtree(self.models, ignore_errors=True)
            os.close(self._models_lock)


def _create(path: Path) -> int:
    """Makes a directory of this server. Returns the lock on it."""
    # Locked before it has its name: another server that starts just now must not take it for a dead one's.
    unnamed = path.with_name(f".{path.name}")
    shutil.rmtree(unnamed, ignore_errors=True)  # of a server with our pid that was killed on these lines
    unnamed.mkdir(mode=0o700)
    lock = os.open(unnamed, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (unnamed / MARKER).touch()
        unnamed.rename(path)
    except OSError:
        os.close(lock)
        raise
    return lock


def _roots(environ: Mapping[str, str]) -> list[Path]:
    """The folders in which this user's servers may have their directories, the best first."""
    chosen = environ.get("MINSERVE_RUNTIME_DIR")
    candidates = [chosen] if chosen else [environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    # Absolute: the ranks look for the sockets from their model directory.
    return [path for path in map(Path, dict.fromkeys(candidates)) if path.is_absolute() and path.is_dir()]


def runtime_root(environ: Mapping[str, str]) -> Path:
    """The folder for the directory of a new server.

    Raises:
        StartupError: there is none.
    """
    for path in _roots(environ):
        short = len(os.fsencode(path)) + len("/minserve-4194304") + _LONGEST_NAME <= UNIX_PATH_BYTES
        if short and os.access(path, os.W_OK | os.X_OK):
            return path
    chosen = environ.get("MINSERVE_RUNTIME_DIR")
    places = f"MINSERVE_RUNTIME_DIR={chosen} is not" if chosen else "none of XDG_RUNTIME_DIR, TMPDIR and /tmp is"
    raise StartupError(f"no directory for the worker sockets: {places} writable and short")


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server that runs, from the file that it leaves in its directory.

    Attributes:
        inference: its address, as those of management and metrics, see `minserve.client`; that of metrics may be "".
        certificate: the server's, in PEM; "" without TLS.
        key_file: where the keys stand that requests need; "": they need none.
    """

    pid: int
    inference: str
    management: str
    metrics: str = ""
    certificate: str = ""
    key_file: str = ""

    def management_key(self) -> str:
        """The key for its management address; "" if it needs none, or cannot be read by this user."""
        try:
            return str(json.loads(Path(self.key_file).read_bytes())["management"]["key"]) if self.key_file else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def live_servers(environ: Mapping[str, str]) -> list[LiveServer]:
    """This user's servers that listen, wherever a server may have its directory.

    A server may have been started without XDG_RUNTIME_DIR, by cron say, and be looked for with it.
    """
    servers = []
    for path in [path for root in _roots(environ) for path in _own_directories(root)]:
        try:
            lock = _take_lock(path)
            if lock is None:
                servers.append(LiveServer(**json.loads((path / SERVER_FILE).read_text())))
            else:
                os.close(lock)
        except (OSError, ValueError, TypeError):
            continue  # it does not listen yet, or has just gone
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
        try:
            lock = _take_lock(path)
        except OSError:
            continue
        if lock is not None:
            if (path / MARKER).exists():
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _take_lock(path: Path) -> int | None:
    """The lock of a dead server's directory; None while its server lives."""
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
