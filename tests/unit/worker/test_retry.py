import pytest

from minserve.worker.retry import RetryWindow, SameLoadError
from tests.fakes import FakeClock

STEPS = (0.0, 1.0, 2.0, 3.0)


class TestRetryWindow:
    def test_the_steps_follow_each_other_and_the_last_repeats(self) -> None:
        window = RetryWindow(FakeClock(), STEPS, window=300, stable=60, most=None)
        assert [window.failed(served=False) for _ in range(6)] == [0, 1, 2, 3, 3, 3]

    def test_restarts_end_with_the_window_that_the_first_failure_opened(self) -> None:
        clock = FakeClock()
        clock.advance(1000)
        window = RetryWindow(clock, (5.0,), window=12, stable=60, most=None)
        assert window.failed(served=False) == 5
        clock.advance(6)
        assert window.failed(served=False) == 5
        clock.advance(4)
        assert window.failed(served=False) == 2, "the last restart comes at the window's end, not behind it"
        clock.advance(2)
        assert window.failed(served=False) is None

    def test_a_worker_that_was_ready_long_enough_begins_anew(self) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=100, stable=60, most=None)
        assert [window.failed(served=False), window.failed(served=False)] == [0, 1]
        clock.advance(50)
        window.ready()
        clock.advance(60)
        assert [window.failed(served=False), window.failed(served=False)] == [0, 1]

    def test_a_worker_that_was_ready_too_briefly_does_not(self) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=100, stable=60, most=None)
        assert window.failed(served=False) == 0
        for delay in (1, 2):  # crashes soon after each start: the same trouble goes on
            window.ready()
            clock.advance(49)
            assert window.failed(served=False) == delay
        clock.advance(2)
        assert window.failed(served=False) is None

    def test_time_in_start_does_not_count_as_ready(self) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=1000, stable=60, most=None)
        window.ready()
        clock.advance(60)
        assert window.failed(served=False) == 0
        clock.advance(60)
        assert window.failed(served=False) == 1

    def test_a_worker_that_serves_between_failures_is_restarted_for_ever_but_ever_later(self) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=30, stable=60, most=1)
        for delay in (0, 1, 2, 3, 3, 3):
            window.ready()
            clock.advance(20)
            assert window.failed(served=True) == delay
        assert window.failed(served=False) is None, "one that only loads is not worth more restarts"

    @pytest.mark.parametrize(("most", "delays"), [(0, [None]), (2, [0, 1, None, None])])
    def test_the_number_of_restarts_is_bounded(self, most: int, delays: list[float | None]) -> None:
        window = RetryWindow(FakeClock(), STEPS, window=300, stable=60, most=most)
        assert [window.failed(served=False) for _ in delays] == delays

    def test_a_new_window_has_all_its_restarts(self) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=300, stable=60, most=1)
        for _ in range(3):
            assert window.failed(served=False) == 0
            window.ready()
            clock.advance(60)

    def test_a_window_of_nothing_allows_no_restart(self) -> None:
        assert RetryWindow(FakeClock(), STEPS, window=0, stable=60, most=None).failed(served=False) is None

    @pytest.mark.parametrize("most", [None, 3])
    def test_one_may_ask_before_without_changing_anything(self, most: int | None) -> None:
        clock = FakeClock()
        window = RetryWindow(clock, STEPS, window=30, stable=60, most=most)
        for served in (False, False, True, False, False, False, False):
            window.ready()
            clock.advance(7)
            told = [window.delay(served) for _ in range(3)]
            assert told == [window.failed(served)] * 3


class TestSameLoadError:
    @pytest.mark.parametrize(
        ("failures", "verdicts"),
        [
            ("a1 a1 a1 a1", "..!!"),
            ("a1 a1 b1 a1 a1", "....."),  # another error
            ("a1 a1 a2 a2 a2", "....!"),  # a changed file
            ("a1 a1 -1 a1 a1 a1", ".....!"),  # no error of the handler's
            ("-1 -1 -1 -1", "...."),
            ("a1 a1 ok a1 a1 a1", ".....!"),
        ],
    )
    def test_three_alike_over_the_same_files_are_a_crash_loop(self, failures: str, verdicts: str) -> None:
        same = SameLoadError()
        told = ""
        for failure in failures.split():
            if failure == "ok":
                same.ready()
                told += "."
            else:
                error, files = failure[0].replace("-", ""), failure[1]
                told += "!" if same.failed(error, files) else "."
        assert told == verdicts
