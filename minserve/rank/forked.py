"""Makes a fork of the warm launcher what an exec of its own would have made: a process with nothing of its parents'.

What cannot be made up for after the fork, `Origin.why_not` finds out before it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import itertools
import multiprocessing.process
import os
import re
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping

# What may be another than the launcher's, because nobody reads it before the fork: minserve, the collectives, CUDA when it
# starts, and what is made up for here. Of any other variable torch, libgomp or Python may have read the old value.
LATE = re.compile(
    r"MINSERVE_\w+|PYTHONPATH|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|(GLOO|NCCL)_SOCKET_IFNAME|(LOCAL_)?(RANK|WORLD_SIZE)"
)
AT_STARTUP = ("sitecustomize", "usercustomize")  # which Python imports at the start of a process
_MainProcess = type(multiprocessing.process.current_process())  # multiprocessing hides the class
_ARG_START, _ENV_START = (
    45,
    47,
)  # of fields 48, arg_start, and 50, env_start, in /proc/<pid>/stat behind the name: proc(5)


class Origin:
    """The launcher as it was started. Made before anything has changed its environment."""

    def __init__(self) -> None:
        self.environ = dict(os.environ)
        self._entries = _entries(self.environ, "/")
        self._path = [entry for entry in sys.path[1:] if entry not in self._entries]
        # Where the kernel has put the environment: what /proc/<pid>/environ shows, also of a fork, and of its forks.
        self._block = _block(_ENV_START)

    def why_not(self, environ: Mapping[str, str], directory: str) -> str:
        """Why a fork would not be what a process of its own is; "" if nothing speaks against it."""
        names = {name for name in environ.keys() | self.environ.keys() if environ.get(name) != self.environ.get(name)}
        if late := sorted(name for name in names if not LATE.fullmatch(name)):
            return f"the launcher was started with another value of {', '.join(late)}"
        loaded = {name.partition(".")[0] for name in sys.modules} - {"__main__"} | set(AT_STARTUP)
        for folder in dict.fromkeys([directory, *_entries(environ, directory)]):
            if folder not in self._entries and (hidden := sorted(loaded & set(_modules(folder)))):
                return f"{folder} has a {hidden[0]} of its own"
        return ""

    def replace_environment(self, environ: Mapping[str, str]) -> None:
        """Puts another environment in place of this process's, also where others look for it: in /proc/<pid>/environ.

        By that the server and its guardian know what belongs to which rank group (worker/processes.py).
        """
        os.environ.clear()  # C's, too
        os.environ.update(environ)
        marks = {name: environ[name] for name in ("MINSERVE_WORKER", "MINSERVE_DIRECTORY")}
        shown = b""
        for name, value in {**marks, **environ}.items():
            entry = os.fsencode(f"{name}={value}") + b"\0"
            if name != "MINSERVE_SECRET" and len(shown) + len(entry) <= len(self._block):
                shown += entry
        _show(shown, self._block)

    def set_path(self, environ: Mapping[str, str], directory: str) -> None:
        """The import path that `python -m` in this directory has."""
        sys.path[:] = [directory, *dict.fromkeys([*_entries(environ, directory), *self._path])]
        importlib.invalidate_caches()


def show_module(name: str) -> None:
    """What `ps` shows of this process: `python -u -m` and this module, all that the launcher's own command has room for."""
    sys.orig_argv[:] = [sys.executable, "-u", "-m", name]
    _show(b"".join(os.fsencode(word) + b"\0" for word in sys.orig_argv), _block(_ARG_START))


def _block(field: int) -> range:
    """Memory that the kernel shows to others, between the addresses in this field of /proc/<pid>/stat and the next."""
    start, end = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[field : field + 2]
    return range(int(start), int(end))


def _show(data: bytes, block: range) -> None:
    ctypes.memmove(block.start, data[: len(block)].ljust(len(block), b"\0"), len(block))


def _entries(environ: Mapping[str, str], directory: str) -> list[str]:
    """What PYTHONPATH stands for in that directory."""
    path = environ.get("PYTHONPATH", "")
    return [os.path.normpath(os.path.join(directory, entry)) for entry in path.split(os.pathsep)] if path else []


def _modules(folder: str) -> Iterable[str]:
    """The modules and packages in a folder."""
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.endswith((".py", ".so")) or os.path.isfile(os.path.join(entry.path, "__init__.py")):
                    yield entry.name.partition(".")[0]
    except OSError:
        return


def open_files() -> dict[int, str]:
    """What is open in this process, by number: a path, or such as `pipe:[123]`, which is no other pipe's."""
    files = {}
    for name in os.listdir("/proc/self/fd"):  # not os.closerange's way: up to the limit it may be a billion calls
        with contextlib.suppress(OSError):  # the listing itself
            files[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return files


def close_files(but: Container[int] = ()) -> None:
    """Closes all but stdin, stdout, stderr and these. Their owners must never come to close the numbers once more."""
    for number in open_files():
        if number > 2 and number not in but:
            os.close(number)


def reset_signals() -> None:
    """Signals as at the start of a Python process, none blocked."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):  # what is ignored stays so, as it would in an exec
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def run_rank() -> None:
    """Runs `python -u -m minserve.rank` in this process."""
    _be_a_main_process()
    import torch  # the launcher has

    if torch.cuda._is_in_bad_fork():
        sys.exit("CUDA was in use in the process that has forked this one, so there is none here")
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    if threads != 1:  # the launcher's own; libgomp has read it already
        torch.set_num_threads(threads)
    torch.default_generator.seed()  # random does that by itself
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    sys.argv[:] = ["-m"]
    show_module("minserve.rank")
    for name in AT_STARTUP:
        if sys.modules.pop(name, None) is not None:
            importlib.import_module(name)
    runpy.run_module("minserve.rank", run_name="__main__", alter_sys=True)


def _be_a_main_process() -> None:
    """For multiprocessing this is nobody's child."""
    process = multiprocessing.process
    process._current_process = _MainProcess()  # type: ignore[attr-defined]
    process._parent_process = None  # type: ignore[attr-defined]
    process._process_counter = itertools.count(1)  # type: ignore[attr-defined]
    process._children = set()  # type: ignore[attr-defined]
    process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]


def leave(main: Callable[[], object]) -> NoReturn:
    """Runs `main` and ends the process as the interpreter does, but for what C++ has to tidy up.

    It must not come back to the frames above, which are the launcher's, and in a rank the agent's and multiprocessing's.
    """
    code = 0
    try:
        main()
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)
