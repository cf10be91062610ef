"""The guardian: a small process that outlives a server that is killed, ends what its ranks have started, and tidies up.

When the server dies the kernel ends every agent and every rank (PR_SET_PDEATHSIG), but nothing that these have started, and
no pip.
The guardian holds the other end of a pipe, which tells it at once. It knows the server's processes by their environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time

# No other imports up here: the other process runs this file alone, without minserve and site-packages, in some 10 MB.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

SWEEPS = 8  # the first finds what is there; the others what was being started just then
PAUSE_S = 0.1
FAREWELL_S = 5.0


class Guardian:
    """The server's end.

    Args:
        directory: the server's runtime directory.
        others: directories that go with it.
    """

    def __init__(self, directory: Path, *others: Path) -> None:
        import subprocess

        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(directory), *map(str, others)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # what kills the server's process group must leave it alone
        )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def dismiss(self) -> None:
        """Ends it: the server ends in order and has left nothing behind."""
        import subprocess

        assert self._process.stdin is not None
        try:
            with self._process.stdin as pipe:
                pipe.write(b"farewell")
            self._process.wait(FAREWELL_S)
        except BrokenPipeError:  # somebody has killed it
            self._process.wait()
        except subprocess.TimeoutExpired:  # somebody has stopped it
            self._process.kill()
            self._process.wait()


def main(directory: str, *others: str) -> None:
    """Waits for the server's end and cleans up after it, unless it said farewell."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are the server's, whose end this process is to see
    if os.read(0, 1):
        return
    marks = [b"\0MINSERVE_DIRECTORY=" + os.fsencode(path) + b"/" for path in (directory, *others)]
    for _ in range(SWEEPS):
        for pid in _carriers(marks):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(PAUSE_S)

    import shutil

    for path in (directory, *others):
        shutil.rmtree(path, ignore_errors=True)


def _carriers(marks: list[bytes]) -> list[int]:
    pids = []
    for name in os.listdir("/proc"):
        try:
            if not name.isdigit() or os.stat(f"/proc/{name}").st_uid != os.getuid():
                continue
            with open(f"/proc/{name}/environ", "rb") as file:
                environ = b"\0" + file.read()
                if any(mark in environ for mark in marks):
                    pids.append(int(name))
        except OSError:
            continue
    return pids


if __name__ == "__main__":
    main(*sys.argv[1:])
