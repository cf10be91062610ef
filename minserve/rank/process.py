"""What a rank does to its process before anything else, and how it makes sure never to outlive the others."""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True, slots=True)
class Launch:
    """What the server and torchrun put into the environment."""

    rank: int
    local_rank: int
    world_size: int
    endpoint: str
    worker: str
    secret: str
    directory: Path
    debug: bool
    bare_log: bool = False


def die_with_the_agent() -> None:
    """Asks the kernel to kill this rank when torchrun (or, without torchrun, the server) dies.

    Also in the middle of a collective, where a rank reads no socket and runs no Python. An agent that died before this line
    is found out at the next step: its server kills the group, and there is nothing left to connect to.
    """
    if not die_with(os.getppid()):
        os._exit(1)


def die_with(parent: int) -> bool:
    """Asks the kernel to kill this process when its parent dies. False: it has died already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def read_environment(environ: MutableMapping[str, str]) -> Launch:
    """Takes the launch out of the environment. The secret is removed: the handler's own children need not know it."""
    local_rank = int(environ["LOCAL_RANK"])
    return Launch(
        rank=int(environ["RANK"]),
        local_rank=local_rank,
        world_size=int(environ["WORLD_SIZE"]),
        endpoint=f"{environ['MINSERVE_ENDPOINT']}{int(environ['MINSERVE_BASE']) + local_rank}",
        worker=environ["MINSERVE_WORKER"],
        secret=environ.pop("MINSERVE_SECRET"),
        directory=Path(environ["MINSERVE_DIRECTORY"]),
        debug=environ.get("MINSERVE_LOG_LEVEL") == "debug",
        bare_log="MINSERVE_BARE_LOG" in environ,
    )


def redirect_output(launch: Launch) -> None:
    """Puts this rank's own pipe in place of the stdout and stderr that all ranks inherited from torchrun.

    Raises:
        OSError: nobody reads it: the server has died, and this rank must not wait for another one.
    """
    fifo = os.open(launch.directory / f"output.{launch.local_rank}", os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(fifo, True)
    os.dup2(fifo, 1)
    os.dup2(fifo, 2)
    os.close(fifo)


def configure_logging(launch: Launch) -> None:
    """Logging to stdout, as TorchServe's workers do; `--log-level debug` reaches minserve's own loggers.

    `bare_log` is TorchServe's form, the message alone, which people who log JSON rely on.
    """
    form = "%(message)s" if launch.bare_log else "%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=form)
    if launch.debug:
        logging.getLogger("minserve").setLevel(logging.DEBUG)


def connect(launch: Launch) -> socket.socket:
    """A blocking connection to the server's endpoint for this rank."""
    scheme, _, address = launch.endpoint.partition(":")
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(address)
    else:
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def run_to_the_end(run: Callable[[], int]) -> int:
    """Runs the rank and returns its exit code.

    What flies out of it (a handler's SystemExit, a frame that is none) ends the process at once, without the second or so
    that taking torch down costs: the other ranks wait in a collective.
    """
    try:
        return run()
    except BaseException as error:
        code = 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_the_group() -> None:
    """Ends this rank and what it has started, at once: the server is gone, and torchrun's death will not reach them."""
    if os.getpgid(0) == os.getpid():  # torchrun, and the server without it, make a rank the leader of its group
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def exit_when_the_server_is_gone(connection: socket.socket) -> None:
    """Watches the link in a thread of its own and ends the process when the server hangs up.

    The parent-death signal does this for the rank itself, as soon as torchrun has died of the same. This thread is quicker,
    for the kernel closes a dying server's sockets first, and so most often takes along what the rank has started.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLRDHUP)  # not POLLIN: the frames are the main thread's

    def watch() -> None:
        poll.poll()
        end_the_group()

    threading.Thread(target=watch, name="minserve-hangup", daemon=True).start()
