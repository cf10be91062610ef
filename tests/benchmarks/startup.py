"""From spawn to READY on 2 ranks, against plain torchrun with minserve's options and the same all-reduce."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.programs import Program, start_minserve, wait_for_inference
from tests.benchmarks.report import Aim, compare

if TYPE_CHECKING:
    from tests.benchmarks.plan import Plan
    from tests.benchmarks.report import Row
    from tests.benchmarks.workspace import Workspace

ALL_REDUCE = Path(__file__).with_name("all_reduce.py")
RANKS = 2
# minserve sets these for its ranks.
RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}


def measure(plan: Plan, workspace: Workspace) -> list[Row]:
    """Both in turns, each ended before the other starts: they would share the cores."""
    store = workspace.add_model("start", "all-reduce", ALL_REDUCE, ranks=RANKS, batch_size=1)
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(1, plan.starts + 1):
        ours.append(_time_minserve(workspace, store))
        theirs.append(_time_torchrun(workspace, number))
        plan.tell(f"start {number} of {plan.starts}: minserve {ours[-1]:.2f} s, torchrun {theirs[-1]:.2f} s")
    return [compare("start to READY, 2 ranks, one all-reduce", "s", ours, "torchrun", theirs, Aim("≤", 1.3))]


def _time_minserve(workspace: Workspace, store: Path) -> float:
    began = time.perf_counter()
    with start_minserve(workspace, "minserve-start", store) as server:
        wait_for_inference(server)
        return time.perf_counter() - began


def _time_torchrun(workspace: Workspace, number: int) -> float:
    folder = workspace.path / f"torchrun-{number}"
    folder.mkdir()
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1",
        "--nproc-per-node",
        str(RANKS),
        "--rdzv-backend",
        "c10d",
    ]
    torchrun += ["--rdzv-conf", "store_type=file", "--rdzv-endpoint", str(folder / "rdzv"), "--rdzv-id", str(number)]
    torchrun += ["--local-addr", "127.0.0.1", "--max-restarts", "0", "--log-dir", str(folder / "elastic")]
    began = time.perf_counter()
    with Program(workspace, "torchrun", [*torchrun, str(ALL_REDUCE)], RANK_ENVIRONMENT) as program:
        program.wait_for("^reduced$")
        return time.perf_counter() - began
