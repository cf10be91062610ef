"""A server in the background: the same command once more, and the wait until it listens."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING

from minserve.worker.runtime import live_servers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from minserve.worker.runtime import LiveServer

LOOK_S = 0.05


def start(arguments: Sequence[str], output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Starts `minserve` with these arguments in a session of its own.

    Args:
        output: for what it prints; None: where this process prints.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "minserve", *arguments],  # -P: a `queue.py` in the current folder is not Python's
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def wait(process: subprocess.Popen[bytes], environ: Mapping[str, str], timeout: float) -> LiveServer | None:
    """Waits until a server listens. None: it has ended before that, or `timeout` seconds have passed."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        for server in live_servers(environ):
            if server.pid == process.pid:
                return server
        time.sleep(LOOK_S)
    return None
