"""The double fork. Everything else of the launcher needs torch: tests/integration/test_warm.py."""

import subprocess
import sys

import pytest

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
