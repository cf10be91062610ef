"""The server's metrics: where every value goes, to Prometheus or into the log, as metrics_mode says (torchserve.md 3).

| mode | |
|---|---|
| prometheus | every metric is a series that /metrics shows; nothing is logged |
| log | every value is a line of the loggers `ts_metrics` and `model_metrics`; /metrics is empty |
| legacy | three counters are series, every other value is a line |
"""

from __future__ import annotations

import logging
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Literal

from minserve.telemetry.declarations import (
    DEFAULT,
    LEGACY,
    REQUESTS_2XX,
    REQUESTS_4XX,
    REQUESTS_5XX,
    Declaration,
    Declarations,
)
from minserve.telemetry.lines import Logged
from minserve.telemetry.recorded import Complaints, HandlerMetrics
from minserve.telemetry.series import Family, Nothing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

    from minserve.telemetry.recorded import Recorded
    from minserve.telemetry.series import Series

Mode = Literal["log", "prometheus", "legacy"]

HOST = "Host"

ts_log = logging.getLogger("ts_metrics")
model_log = logging.getLogger("model_metrics")


class Metrics:
    """Every metric of one server.

    Args:
        auto_detect: what handlers record is taken in although nobody has declared it.
        hostname: for the labels; this machine's by default.
        now: seconds since the epoch, for log lines.

    Attributes:
        in_flight: tells the bytes of the request bodies that are in the server.
        gather: fetches what other processes have measured, if there are any, before all metrics are shown.
    """

    def __init__(
        self,
        declared: Declarations = DEFAULT,
        mode: Mode = "prometheus",
        auto_detect: bool = False,
        hostname: str = "",
        now: Callable[[], float] = time.time,
    ) -> None:
        self.mode = mode
        self.hostname = hostname or socket.gethostname()
        self.in_flight: Callable[[], int] = lambda: 0
        self.gather: Callable[[], Awaitable[None]] | None = None
        self._now = now
        self._families: list[Family] = []
        self._complaints = Complaints()
        self._server = {one.name: self._metric(ts_log, one) for one in declared.server}
        self._handlers = HandlerMetrics(
            *(declared.model, partial(self._metric, model_log), self._server, auto_detect, mode == "prometheus"),
            *(self.hostname, self._complaints),
        )
        self._answers: dict[int, Series] = {}

    # ── the server's own values ──

    def of_server(self, declaration: Declaration, *values: str) -> Series:
        """The series of one of the server's metrics, to be kept by whoever records often.

        Args:
            values: of its labels; the last one, the host's name, is added. Their number is that of the usual declaration.
        """
        return self._of_server(declaration.name, values)

    def system(self, name: str, value: float, values: Sequence[str], hostname: str = "") -> None:
        """Records a value of the machine. One that nobody has declared, or with other labels, is dropped."""
        metric = self._server.get(name)
        if metric is None:
            return
        declared = list(metric.declaration.dimensions)
        if len(values) + 1 != len(declared):
            what = f"has {len(values) + 1} dimensions, declared are {declared}"
            self._complaints.tell(name, what, "dimensions")
            return
        self._of_server(name, values, hostname).record(value)

    def answered(self, status: int) -> None:
        """Counts an answer of any port."""
        series = self._answers.get(status // 100)
        if series is None:
            declaration = {2: REQUESTS_2XX, 4: REQUESTS_4XX}.get(status // 100, REQUESTS_5XX)
            series = self._answers[status // 100] = self.of_server(declaration, HOST)
        series.record(1.0)

    # ── what handlers record ──

    def from_rank(self, rank: int, values: Iterable[Recorded]) -> None:
        """Records what a rank has sent. What cannot be taken is told once, and dropped."""
        self._handlers.record(rank, values)

    def of_rank0(self, declaration: Declaration, *values: str) -> Series:
        """The series of what the server records for rank 0, to be kept. Dropped where metrics_config has no such gauge."""
        return self._handlers.gauge(declaration.name, tuple(zip(declaration.dimensions, values, strict=True)))

    # ── for Prometheus ──

    def text(self, names: Collection[str] = ()) -> str:
        """Every series, or those of the samples that are asked for. Empty in mode log."""
        return "".join(line for family in self._families for line in family.lines(names))

    # ── inside ──

    def _of_server(self, name: str, values: Sequence[str], hostname: str = "") -> Series:
        metric = self._server.get(name)
        if metric is None:
            return Nothing()
        every = (*values, hostname or self.hostname)
        return metric.series(tuple(zip(metric.declaration.dimensions, every, strict=True)))

    def _metric(self, log: logging.Logger, declaration: Declaration) -> Family | Logged:
        if self.mode == "log" or (self.mode == "legacy" and declaration.name not in LEGACY):
            return Logged(declaration, log, self._now)
        family = Family(declaration)
        self._families.append(family)
        return family
