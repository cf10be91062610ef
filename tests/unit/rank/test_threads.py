from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from minserve.rank import threads
from minserve.rank.inbox import Inbox
from tests.unit.rank.rig import DEADLINE_S, PacedConnection, Running, batch, cancel

ENOUGH_LOOKS = 10 * threads.STILL_LOOKS
LOOK_S = 0.001


class Looks:
    """In place of the time between two looks. After `ENOUGH_LOOKS` it does `release`; before, `meanwhile` each time."""

    def __init__(self) -> None:
        self.count = 0
        self.release: Callable[[], object] = lambda: None
        self.meanwhile: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.count += 1
        assert self.count < DEADLINE_S / LOOK_S, "it waits without end"
        if self.count == ENOUGH_LOOKS:
            self.release()
        elif self.count < ENOUGH_LOOKS:
            self.meanwhile()
        time.sleep(LOOK_S)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    it = Looks()
    monkeypatch.setattr(threads, "time", it)
    return it


def start(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def is_waited_for(looks: Looks, target: Callable[[], object], release: Callable[[], object]) -> bool:
    """Whether `wait_for_end` waits for a thread with this target until `release` lets it end."""
    others = threads.alive()
    thread = start(target)
    looks.release = release
    threads.wait_for_end(others)
    waited = looks.count >= ENOUGH_LOOKS
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    return waited


def is_left_alone(looks: Looks, target: Callable[[], object], release: Callable[[], object]) -> bool:
    """Whether `wait_for_end` returns while such a thread is there."""
    others = threads.alive()
    thread = start(target)
    threads.wait_for_end(others)
    there = thread.is_alive()
    release()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    return there


@pytest.fixture
def closed() -> threading.Lock:
    """What a thread comes through only when a test says so, without a call in Python: as in a collective."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def test_threads_that_were_there_before_are_none_of_the_batchs(looks: Looks, closed: threading.Lock) -> None:
    thread = start(closed.acquire)
    threads.wait_for_end(threads.alive())
    assert looks.count == 0
    closed.release()
    thread.join(DEADLINE_S)


def test_a_thread_that_works_is_waited_for(looks: Looks, closed: threading.Lock) -> None:
    def work() -> None:
        with closed:
            pass

    assert is_waited_for(looks, work, closed.release)


def test_work_in_c_that_is_all_a_thread_was_given_is_waited_for(looks: Looks, closed: threading.Lock) -> None:
    """Its innermost Python call is then `run` in threading.py: `Thread(target=work.wait)` waits for a collective."""
    assert is_waited_for(looks, closed.acquire, closed.release)


def test_work_in_c_that_is_all_a_pool_was_given_is_waited_for(looks: Looks, closed: threading.Lock) -> None:
    others = threads.alive()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(closed.acquire)
        looks.release = closed.release
        threads.wait_for_end(others)
        assert looks.count >= ENOUGH_LOOKS
        assert job.result(DEADLINE_S)


def test_threads_that_hand_work_to_each_other_are_waited_for(looks: Looks) -> None:
    """Each of them waits for the other, at most times that one looks; but not for long."""
    over, rounds = threading.Event(), [0]
    there, back = queue.Queue[int](), queue.Queue[int]()

    def answer() -> None:
        while there.get():
            back.put(1)

    def ask() -> None:
        answering = start(answer)
        while not over.is_set():
            there.put(1)
            back.get()
            rounds[0] += 1
        there.put(0)
        answering.join()

    def let_them_work() -> None:
        before = rounds[0]
        while rounds[0] == before:
            time.sleep(0)

    looks.meanwhile = let_them_work
    assert is_waited_for(looks, ask, over.set)


def test_a_thread_that_waits_with_a_limit_is_waited_for(looks: Looks) -> None:
    """It goes on by itself, and then perhaps with a collective."""
    over, never = threading.Event(), threading.Event()

    def generate() -> None:
        while not over.is_set():
            never.wait(0.05)

    assert is_waited_for(looks, generate, over.set)


def test_a_thread_that_waits_for_its_own_grant_is_waited_for(looks: Looks) -> None:
    """The cancel that it waits for is there, or it would not be waited for: it is about to leave."""
    connection = PacedConnection()
    inbox = Inbox(connection)
    reader = Running(inbox.next)
    assert connection.read.wait(DEADLINE_S)
    assert is_waited_for(looks, lambda: inbox.wait_for_grant(1, 1), lambda: connection.give(cancel(1, 0)))
    connection.give(batch(2))
    assert reader.result().seq == 2


@pytest.mark.parametrize("name", [threads.BATCH_THREAD, threads.HOP_THREAD])
def test_minserves_own_are_not_waited_for(looks: Looks, closed: threading.Lock, name: str) -> None:
    def work() -> None:
        with closed:
            pass

    others = threads.alive()
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    threads.wait_for_end(others)
    assert looks.count == 0
    closed.release()
    thread.join(DEADLINE_S)


@pytest.mark.parametrize("waiting", ["for an item", "for an event", "for room", "for a thread"])
def test_a_thread_that_waits_for_another_is_not_waited_for(looks: Looks, waiting: str) -> None:
    items, full, event = queue.Queue[int](), queue.Queue[int](maxsize=1), threading.Event()
    full.put(1)
    other = start(event.wait)
    targets: dict[str, Callable[[], object]] = {
        "for an item": items.get,
        "for an event": event.wait,
        "for room": lambda: full.put(2),
        "for a thread": other.join,
    }

    def release() -> None:
        items.put(1)
        event.set()
        full.get()

    assert is_left_alone(looks, targets[waiting], release)


def test_a_pools_idle_workers_are_not_waited_for(looks: Looks) -> None:
    others = threads.alive()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(len, ["a", "b"]))
        threads.wait_for_end(others)  # or it never returns


def endless(file: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """A function of that file which waits, with a limit, again and again; and what ends it."""
    over = threading.Event()
    module: dict[str, object] = {"over": over}
    exec(compile("def run():\n    while not over.wait(0.01): pass", file, "exec"), module)
    run: Callable[[], object] = module["run"]  # type: ignore[assignment]  # what `exec` has put there
    return run, over.set


@pytest.mark.parametrize(
    "file",
    [
        "/env/site-packages/tqdm/_monitor.py",
        "/usr/lib/python3/dist-packages/exporter/loop.py",
        "/env/site-packages/torch/_inductor/compile_worker/subproc_pool.py",
    ],
)
def test_a_librarys_endless_thread_is_not_waited_for(looks: Looks, file: str) -> None:
    assert is_left_alone(looks, *endless(file))


@pytest.mark.parametrize(
    "file", ["/env/site-packages/torch/distributed/engine.py", "/models/m/handler.py", "/models/m/site/engine.py"]
)
def test_one_of_torchs_or_of_the_handlers_own_is(looks: Looks, file: str) -> None:
    assert is_waited_for(looks, *endless(file))


def test_a_thread_that_is_only_about_to_begin_is_waited_for(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    """`enumerate` lists it, but it has no identity and no frame yet."""
    coming = threading.Thread()
    there = [coming]
    monkeypatch.setattr(threading, "enumerate", lambda: list(there))
    looks.release = there.clear
    threads.wait_for_end(set())
    assert looks.count >= ENOUGH_LOOKS


class Left(BaseException):
    pass


@pytest.mark.parametrize(("error", "told"), [(Left, False), (LookupError, True)])
def test_a_thread_that_a_cancel_ends_leaves_no_traceback(
    error: type[BaseException], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[object] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    threads.ignore_cancelled(Left)
    threading.excepthook(SimpleNamespace(exc_type=error))  # type: ignore[arg-type]  # all that is looked at
    assert bool(heard) is told
