"""What is measured, by the names of `--only`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.benchmarks.scenarios import (
    bodies,
    delivery,
    group_sizes,
    life,
    neighbours,
    pipelines,
    serving,
    streams,
    windows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.benchmarks.report import Findings
    from tests.benchmarks.run import Run

SCENARIOS: Mapping[str, Callable[[Run], Findings]] = {
    "no-op": serving.no_op,
    "all-reduce": serving.all_reduce,
    "all-reduce-dedicated": serving.all_reduce_dedicated,
    "ranks": group_sizes.measure,
    "servers": neighbours.measure,
    "bodies": bodies.measure,
    "streams": streams.measure,
    "life": life.measure,
    "pipelines": pipelines.measure,
    "batching": windows.measure,
    "delivery": delivery.measure,
}
