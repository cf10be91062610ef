"""The double fork, and the launcher's look at itself. The rest is in tests/integration/test_warm.py."""

import os
import subprocess
import sys

import pytest
import torch

from minserve.rank import warm

SERVER = """
import ctypes, os, signal, sys, time
from minserve.rank.warm import _fork_for
ADOPTS = {adopts}
if ADOPTS:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
server, (told, tell) = os.getpid(), os.pipe()
def run():
    os.write(tell, b"ran")
    signal.pause()
if os.fork() == 0:
    pid = _fork_for(server, lambda: None, run)
    os.write(tell, pid.to_bytes(4, "little"))
    os._exit(0)
os.wait()
pid = int.from_bytes(os.read(told, 4).replace(b"ran", b""), "little") if not ADOPTS else 0
data = b""
while ADOPTS and len(data) < 7:
    data += os.read(told, 7)
if ADOPTS:
    pid = int.from_bytes(data.replace(b"ran", b""), "little")
    print(open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[1] == str(server))
    os.kill(pid, signal.SIGKILL)
    print(os.waitpid(pid, 0) == (pid, signal.SIGKILL))
else:
    os.close(tell)
    print(os.read(told, 9))
"""


@pytest.mark.parametrize(("adopts", "said"), [(True, "True\nTrue\n"), (False, "b''\n")])
def test_what_is_forked_is_the_servers_child_or_nothing(adopts: bool, said: str) -> None:
    """Without a server that adopts orphans nobody would end it."""
    command = [sys.executable, "-c", SERVER.format(adopts=adopts)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == said


@pytest.mark.parametrize(
    ("threads", "cuda", "file", "reason"),
    [
        (1, False, "/dev/null", ""),
        (2, False, "/dev/null", "started a thread"),
        (1, True, "/dev/null", "initialised CUDA"),
        (1, False, "/dev/nvidiactl", "opened /dev/nvidiactl"),
    ],
)
def test_a_launcher_that_torch_has_given_a_thread_or_a_device_is_none(
    threads: int, cuda: bool, file: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"/proc/self/task": ["9"] * threads, "/proc/self/fd": ["0"]}
    monkeypatch.setattr(os, "listdir", found.__getitem__)
    monkeypatch.setattr(os.path, "realpath", lambda path: file)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    assert warm._unfit() == reason
