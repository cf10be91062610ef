"""Whether a worker that has failed is worth another start, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minserve.dispatch.clock import Clock

SAME_LOAD_ERRORS = 3  # in a row, over unchanged files: the next start would end alike


class RetryWindow:
    """How often and how long a worker is restarted.

    The window opens with a worker's first failure and closes when it has carried a batch through, or has been READY for
    `stable` seconds: one that serves between failures is worth restarting, one that only loads is not. The steps of the
    back-off begin anew after `stable` seconds alone.

    Args:
        steps: seconds to wait before each restart; the last one repeats.
        window: seconds of failing after which restarts end.
        stable: seconds in READY after which earlier failures are forgotten.
        most: most restarts in one window, None for any number.
    """

    def __init__(self, clock: Clock, steps: Sequence[float], window: float, stable: float, most: int | None) -> None:
        self._clock = clock
        self._steps = steps
        self._window = window
        self._stable = stable
        self._most = most
        self._opened: float | None = None
        self._ready_since: float | None = None
        self._restarts = 0
        self._step = 0

    def ready(self) -> None:
        """The worker has become READY."""
        self._ready_since = self._clock.time()

    def delay(self, served: bool) -> float | None:
        """What `failed` would return just now."""
        opened, restarts, step = self._count(served)
        left = opened + self._window - self._clock.time()
        if left <= 0 or (self._most is not None and restarts >= self._most):
            return None
        return min(self._steps[min(step, len(self._steps) - 1)], left)

    def failed(self, served: bool) -> float | None:
        """The worker has failed.

        Args:
            served: whether it had carried a batch through since it became READY.

        Returns:
            Seconds to wait before the restart; None if there shall be none.
        """
        delay = self.delay(served)
        self._opened, self._restarts, self._step = self._count(served)
        self._ready_since = None
        if delay is not None:
            self._step += 1
            self._restarts += 1
        return delay

    def _count(self, served: bool) -> tuple[float, int, int]:
        """When the window was opened, how many restarts there were in it, and the next step, if it fails now."""
        now = self._clock.time()
        stable = self._ready_since is not None and now - self._ready_since >= self._stable
        step = 0 if stable else self._step
        if stable or served or self._opened is None:
            return now, 0, step
        return self._opened, self._restarts, step


class SameLoadError:
    """Counts starts that ended with the same error of the handler over the same files."""

    def __init__(self) -> None:
        self._last: tuple[str, str] | None = None
        self._times = 0

    def ready(self) -> None:
        """The worker has become READY."""
        self._last = None

    def failed(self, load_error: str, files: str) -> bool:
        """The worker has failed.

        Args:
            load_error: what the handler raised while it was loaded, "" if it was something else.
            files: the model directory's fingerprint.

        Returns:
            Whether that is a crash loop.
        """
        if not load_error:
            self._last = None
            return False
        self._times = self._times + 1 if (load_error, files) == self._last else 1
        self._last = (load_error, files)
        return self._times >= SAME_LOAD_ERRORS
