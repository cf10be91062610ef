"""What a request may tell a rank to do to itself, and what a rank is told to do while it loads.

A request's body is JSON: {"nonce": 17, "work": 0.1, "fault": {"do": "exit", "ranks": [1], "moment": "before", "at": 5.2}}.
`at` is on the clock CLOCK_MONOTONIC, which all processes of a machine share: the rank waits for that moment, so that whoever
sent the request knows to the millisecond when the fault happened. Runs in ranks, imports no torch unless a fault needs it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from minserve.wire.frames import HEADER, MAGIC, Kind, encode

Row = dict[str, Any]
FOREVER_S = 3600


class TeapotError(Exception):
    """Asks for a status of its own."""

    error_code = 418


def rank() -> int:
    return int(os.environ["RANK"])


def rows(data: list[dict[str, Any]]) -> list[Row]:
    """The requests of a batch."""
    return [row["body"] for row in data]


def piece(number: int, of_rank: int, world: int) -> int:
    """A rank's part of a number: every world-th bit. Only the parts of the same number add up to it."""
    return sum(1 << bit for bit in range(number.bit_length()) if number >> bit & 1 and bit % world == of_rank)


def told(batch: list[Row], what: str) -> bool:
    """Whether the batch tells this rank to do something that the handler itself must see to."""
    return any(
        row.get("fault", {}).get("do") == what and rank() in row["fault"]["ranks"] and _wait(row["fault"])
        for row in batch
    )


def obey(batch: list[Row], moment: str, step: int = 0) -> None:
    """Does what the batch's requests tell this rank to do at this moment."""
    for row in batch:
        fault = row.get("fault")
        if not fault or rank() not in fault["ranks"] or fault["moment"] != moment or fault.get("step", 0) != step:
            continue
        act = _ACTS.get(fault["do"])
        if act is not None:
            _wait(fault)
            act(fault)


def _wait(fault: Row) -> bool:
    time.sleep(max(0.0, fault["at"] - time.monotonic()))
    return True


# ── deaths ──


def _kill_the_agent(fault: Row) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(FOREVER_S)


def _exit(fault: Row) -> NoReturn:
    os._exit(fault["code"])


def _segfault(fault: Row) -> None:
    ctypes.string_at(0)


# ── exceptions ──


def _raise(fault: Row) -> NoReturn:
    raise ValueError("told to fail")


def _raise_own(fault: Row) -> NoReturn:
    raise ValueError(f"told to fail on rank {rank()}")


def _raise_different(fault: Row) -> NoReturn:
    if rank() == 0:
        raise KeyError("told to fail on rank 0")
    raise ValueError(f"told to fail on rank {rank()}")


def _raise_behind_the_victims(fault: Row) -> NoReturn:
    """Breaks the group first, so that the others' collective errors are there before this rank's own exception."""
    import torch.distributed as dist

    dist.destroy_process_group()
    time.sleep(0.2)
    raise ValueError(f"told to fail on rank {rank()}")


def _raise_coded(fault: Row) -> NoReturn:
    raise TeapotError("told to be a teapot")


def _raise_memory(fault: Row) -> NoReturn:
    raise MemoryError("told to have no memory")


def _raise_collective(fault: Row) -> NoReturn:
    import torch.distributed as dist

    raise dist.DistBackendError("told that the collective has timed out")


def _raise_device(fault: Row) -> NoReturn:
    raise RuntimeError("CUDA error: told that the device is gone")


# ── standing still, or seeming to ──


def _loop(fault: Row) -> None:
    while True:
        pass


def _linger(fault: Row) -> None:
    time.sleep(FOREVER_S)


def _hold_the_gil(fault: Row) -> None:
    """In C that does not let go of it: for some time, or for ever in a mutex that is locked twice, which no signal ends."""
    libc = ctypes.PyDLL(None)
    if "seconds" in fault:
        libc.usleep(int(fault["seconds"] * 1e6))
        return
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def _sleep(fault: Row) -> None:
    time.sleep(fault["seconds"])


# ── lies on the socket ──


def _link() -> socket.socket:
    """This rank's connection to the server: the one socket whose other end has its endpoint's address."""
    scheme, _, prefix = os.environ["MINSERVE_ENDPOINT"].partition(":")
    wanted = f"{prefix}{int(os.environ['MINSERVE_BASE']) + int(os.environ['LOCAL_RANK'])}"
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            found = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue
        try:
            peer = found.getpeername()
        except OSError:
            peer = ""
        address = peer if isinstance(peer, str) else "{}:{}".format(*peer[:2]) if isinstance(peer, tuple) else ""
        if address and (address == wanted or (scheme != "unix" and address.endswith(wanted))):
            return found
        found.close()
    raise LookupError(f"no socket to {wanted}")


def _close(fault: Row) -> None:
    """The server reads the end of it; the rank itself goes on and does not notice."""
    _link().shutdown(socket.SHUT_WR)
    time.sleep(FOREVER_S)


def _hang_up(fault: Row) -> None:
    """The same in both directions, on which a rank ends itself."""
    _link().shutdown(socket.SHUT_RDWR)
    time.sleep(FOREVER_S)


def _garbage(fault: Row) -> None:
    _link().sendall(b"this is no frame at all, whatever you think of it")


def _unknown_request(fault: Row) -> None:
    _link().sendall(encode(Kind.REPLY, 10**6, b"\x92\x90\x00"))


def _forbidden_kind(fault: Row) -> None:
    _link().sendall(encode(Kind.SHUTDOWN))


def _seq_nobody_sent(fault: Row) -> None:
    _link().sendall(encode(Kind.DONE, 2**63, b"\x92\x90\x00"))


def _oversize(fault: Row) -> None:
    _link().sendall(HEADER.pack(MAGIC, Kind.REPLY, 0, 0, 1, 2**60))


def _half_a_frame(fault: Row) -> None:
    link = _link()
    link.sendall(HEADER.pack(MAGIC, Kind.REPLY, 0, 100, 1, 1000) + b"the first bytes")
    link.shutdown(socket.SHUT_WR)
    time.sleep(FOREVER_S)


_ACTS = {
    "exit": _exit,
    "kill_the_agent": _kill_the_agent,
    "segfault": _segfault,
    "raise": _raise,
    "raise_own": _raise_own,
    "raise_different": _raise_different,
    "raise_behind_the_victims": _raise_behind_the_victims,
    "raise_coded": _raise_coded,
    "raise_memory": _raise_memory,
    "raise_collective": _raise_collective,
    "raise_device": _raise_device,
    "loop": _loop,
    "linger": _linger,
    "gil": _hold_the_gil,
    "sleep": _sleep,
    "close": _close,
    "hang_up": _hang_up,
    "garbage": _garbage,
    "unknown_request": _unknown_request,
    "forbidden_kind": _forbidden_kind,
    "seq_nobody_sent": _seq_nobody_sent,
    "oversize": _oversize,
    "half_a_frame": _half_a_frame,
}


# ── while loading ──


def start_helpers() -> None:
    """Two processes, as compilers and data workers are: one in this rank's process group, one in a session of its own."""
    if rank() == int(os.environ["WORLD_SIZE"]) - 1:
        for own_session in (False, True):
            subprocess.Popen(["sleep", str(FOREVER_S)], start_new_session=own_session)


def control_file(worker: str) -> Path:
    """Where a rank looks for its orders: `worker` is MINSERVE_WORKER, "model-number-…"."""
    model = re.sub(r"-\d+-[0-9a-f]+$", "", worker)
    return Path(os.environ["CHAOS_CONTROL"]) / f"{model}.json"


def at_start(stage: str) -> None:
    """Does what the control file tells this rank to do at this stage of its start: "connect" or "load". Once.

    The file is renamed to `.hit`, with the moment in it: that is how the other side learns when it happened.
    """
    if stage == "load":
        start_helpers()
    path = control_file(os.environ["MINSERVE_WORKER"])
    try:
        order = json.loads(path.read_text())
    except OSError:
        return
    if order["stage"] != stage or order["rank"] != rank():
        return
    print(f"chaos: rank {rank()} is told to {order['do']}", file=sys.stderr, flush=True)
    note = path.with_suffix(".tmp")
    note.write_text(json.dumps({"at": time.monotonic(), "pid": os.getpid(), "agent": os.getppid()}))
    path.unlink()
    note.rename(path.with_suffix(".hit"))
    if order["do"] == "signal":
        os.kill(os.getpid(), signal.Signals[order["signal"]])
    else:
        _ACTS[order["do"]](order)
