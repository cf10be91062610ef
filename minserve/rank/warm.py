"""The warm launcher: a process that has imported torch once, and forks the agents and ranks of all rank groups.

It starts no thread and touches no device, so what it forks may do both; where torch's import has, it ends, and plain
launches take over. It is told what to fork over a socket that it has inherited from the server (wire/launching.py). It has
no children for long: what it forks becomes the server's child, as a plain launch is, and lives on when the launcher dies.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

from minserve.rank import agent, forked, process
from minserve.wire.launching import MAX_PACKET, Ready, Refused, Start, Started, decode_start, encode

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    """Serves until the server hangs up. The argument is the number of the inherited socket."""
    origin = forked.Origin()
    server = os.getppid()
    connection = socket.socket(fileno=int(sys.argv[1]))
    _import()
    if reason := _unfit():
        sys.exit(f"no warm launcher: importing torch has {reason}, and a fork would not survive that")
    gc.collect()
    gc.freeze()  # no collection of a fork's touches, and so copies, what it shares with the others
    connection.send(encode(Ready()))
    while True:
        packet, files, _, _ = socket.recv_fds(connection, MAX_PACKET, 1)
        if not packet:
            return
        answer = _start(decode_start(packet), files[0], origin, server)
        for file in files:
            os.close(file)
        connection.send(encode(answer))


def _import() -> None:
    """All that every rank and every agent needs. No handler's modules, nor what only some handlers import."""
    import torch.distributed.elastic.rendezvous.c10d_rendezvous_backend
    import torch.distributed.elastic.rendezvous.dynamic_rendezvous
    import torch.distributed.run  # noqa: F401

    import minserve.rank.loop  # not minserve.rank.__main__: each rank runs that anew
    import minserve.rank.vitals  # noqa: F401


def _unfit() -> str:
    """What must not be there when a process forks: another thread, or a device that is in use. Some torch may bring it."""
    import torch

    if len(os.listdir("/proc/self/task")) > 1:
        return "started a thread"
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "initialised CUDA"
    links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    device = next((link for link in links if link.startswith("/dev/nvidia")), None)
    return f"opened {device}" if device else ""


def _start(start: Start, output: int, origin: forked.Origin, server: int) -> Started | Refused:
    environ = dict(entry.split("=", 1) for entry in map(os.fsdecode, start.environ))
    directory = os.fsdecode(start.directory)
    if reason := origin.why_not(environ, directory):
        return Refused(reason)

    def run() -> NoReturn:
        os.dup2(output, 1)
        os.dup2(output, 2)
        forked.close_files()
        os.setsid()
        forked.leave(main)

    def main() -> None:
        os.chdir(directory)
        origin.set_path(environ, os.getcwd())  # Python, too, takes the folder that a link leads to
        forked.reset_signals()
        if start.torchrun:
            forked.show_module("minserve.rank.agent")
            agent.run(start.torchrun)
        else:
            forked.run_rank()

    try:
        return Started(_fork_for(server, lambda: origin.replace_environment(environ), run))
    except OSError as error:
        return Refused(f"cannot fork: {error.strerror}")


def _fork_for(server: int, prepare: Callable[[], None], run: Callable[[], NoReturn]) -> int:
    """Forks a process that is the server's child.

    A process between that ends at once makes an orphan of it, and the server adopts its orphans (worker/reaper.py). `go`
    holds it back until then. Whoever dies on the way, the rest ends: of the launcher the closed pipe tells.

    Args:
        prepare: called in the process before the server can see it.
    """
    news, tell = os.pipe()
    wait, go = os.pipe()
    try:
        between = os.fork()
    except OSError:
        for file in (news, tell, wait, go):
            os.close(file)
        raise
    if between == 0:
        try:
            os.close(go)
            if os.fork():
                os._exit(0)
            prepare()
            os.write(tell, os.getpid().to_bytes(4, "little"))
            os.close(tell)
            if os.read(wait, 1) and process.die_with(server):
                run()
        finally:
            os._exit(1)
    os.close(tell)
    os.close(wait)
    try:
        os.waitpid(between, 0)
        pid = int.from_bytes(os.read(news, 4), "little")
        if not pid:
            raise OSError(errno.EAGAIN, "no process came of it")
        os.write(go, b"!")
        return pid
    finally:
        os.close(news)
        os.close(go)


if __name__ == "__main__":
    main()
