from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from minserve.rank import scheduling
from minserve.wire.frames import Kind
from tests.unit.rank.rig import Peer, Running, batch, words

POLICY = """
    import os
    import threading

    def policies(data, context):
        seen = [os.sched_getscheduler(0)]
        thread = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
        thread.start()
        thread.join()
        return [str(seen)] * len(data or [])
"""


@contextmanager
def thread(tasks: Path, name: str) -> Iterator[int]:
    """A thread of this process, listed under a name as the kernel lists them."""
    over = threading.Event()
    one = threading.Thread(target=over.wait)
    one.start()
    assert one.native_id is not None
    task = tasks / str(one.native_id)
    task.mkdir()
    (task / "comm").write_text(f"{name}\n")
    try:
        yield one.native_id
    finally:
        over.set()
        one.join()


def test_only_gloos_loop_threads_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "TASKS", tmp_path)
    with thread(tmp_path, "gloo_tcp_loop") as loop, thread(tmp_path, "pt_gloo_runloop") as other:
        scheduling.let_gloo_wait_for_cores()
        assert os.sched_getscheduler(loop) == os.SCHED_BATCH
        assert os.sched_getscheduler(other) == os.SCHED_OTHER


def test_a_policy_that_somebody_has_chosen_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "TASKS", tmp_path)
    with thread(tmp_path, "gloo_tcp_loop") as loop:
        os.sched_setscheduler(loop, os.SCHED_IDLE, os.sched_param(0))
        scheduling.let_gloo_wait_for_cores()
        assert os.sched_getscheduler(loop) == os.SCHED_IDLE


def test_a_thread_that_has_ended_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "TASKS", tmp_path)
    (tmp_path / "1").mkdir()  # without a name any more
    with thread(tmp_path, "gloo_tcp_loop"):
        pass  # it has one, and is gone
    scheduling.let_gloo_wait_for_cores()


def test_a_sandbox_may_forbid_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    Running(scheduling.wait_for_cores).result()


@pytest.mark.parametrize("wait", [False, True])
def test_a_rank_and_what_its_handler_starts_wait_for_cores_if_told_so(tmp_path: Path, wait: bool) -> None:
    with_policy = f"[{os.SCHED_BATCH}, {os.SCHED_BATCH}]" if wait else f"[{os.SCHED_OTHER}, {os.SCHED_OTHER}]"
    with closing(Peer(tmp_path, POLICY, 1, handler="handler.py:policies", wait_for_cores=wait)) as peer:
        peer.give(batch(1, b"x"))
        assert words(peer.until(Kind.REPLY)) == [f"REPLY 1 {with_policy}"]
