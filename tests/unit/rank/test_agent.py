import subprocess
import sys

GUARDED = """
import os, signal
from minserve.rank.agent import _guard_forks
def handler(*_): raise RuntimeError("torchrun's")
signal.signal(signal.SIGTERM, handler)
_guard_forks(os.getpid())
rank = os.fork()
if rank == 0:
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.pthread_sigmask(0, []), flush=True)
    if os.fork() == 0:
        os._exit(0)  # what a rank forks is its own affair
    os.wait()
    os._exit(0)
os.waitpid(rank, 0)
print(signal.getsignal(signal.SIGTERM) is handler, signal.pthread_sigmask(0, []))
"""


def test_a_rank_has_the_signals_of_a_new_process_and_the_agent_keeps_its_own() -> None:
    ended = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "True set()\nTrue set()\n"
