import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.wire.board import STACK_SIGNAL
from minserve.wire.stacks import SETTLED_LOOKS, StackFile


@pytest.fixture
def deaf() -> Iterator[int]:
    """A process without a handler for the signal."""
    with subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid
        assert child.poll() is None, "it was not signalled"
        child.kill()


def test_who_would_die_of_the_signal_is_not_asked(tmp_path: Path, deaf: int) -> None:
    (tmp_path / "stack.0").touch()
    assert STACK_SIGNAL > 0
    assert not StackFile(tmp_path, 0).ask(deaf)
    assert not StackFile(tmp_path, 1).ask(deaf), "nor who has no file"


BUSY = f"""
import faulthandler, signal, threading, time
faulthandler.register({int(STACK_SIGNAL)}, open("stack.0", "wb", buffering=0))
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [{int(STACK_SIGNAL)}])
print(flush=True)
time.sleep(600)
"""


def test_only_the_main_thread_writes_for_no_other_can_read_its_frames(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=-1, cwd=tmp_path) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert StackFile(tmp_path, 0).ask(child.pid)
        status = Path(f"/proc/{child.pid}/status").read_text()
        pending = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigPnd:"))
        child.kill()
    assert pending >> (STACK_SIGNAL - 1) & 1, "it waits for the thread that holds it back"
    assert (tmp_path / "stack.0").read_bytes() == b"", "and no other has taken it"


def test_it_is_settled_when_it_has_grown_and_grows_no_more(tmp_path: Path) -> None:
    path = tmp_path / "stack.0"
    path.write_text("of an earlier time\n")
    file = StackFile(tmp_path, 0)
    assert not any(file.settled() for _ in range(20)), "nothing has come"
    for piece in ("Thread 0x1:\n", '  File "a.py", line 1 in one\n'):
        with path.open("a") as more:
            more.write(piece)
        looks = [file.settled() for _ in range(SETTLED_LOOKS)]
        assert not any(looks)
    assert file.settled()
    assert file.text() == 'Thread 0x1:\n  File "a.py", line 1 in one'


def test_threads_of_minserves_own_are_left_out(tmp_path: Path) -> None:
    file = StackFile(tmp_path, 0)
    ours = [
        '  File "/x/minserve/rank/vitals.py", line 3 in _beat',
        '  File "/x/minserve/rank/process.py", line 9 in watch',
    ]
    (tmp_path / "stack.0").write_text(
        f"Thread 0x1 (most recent call first):\n{ours[0]}\n\nThread 0x2 (most recent call first):\n{ours[1]}\n\n"
        'Current thread 0x3 (most recent call first):\n  File "/m/handler.py", line 2 in handle\n'
    )
    assert file.text() == 'Current thread 0x3 (most recent call first):\n  File "/m/handler.py", line 2 in handle'


def test_a_file_that_has_gone_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "stack.0"
    path.touch()
    file = StackFile(tmp_path, 0)
    path.unlink()
    assert not file.settled()
    assert file.text() == ""
