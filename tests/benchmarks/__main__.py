"""Measures minserve against bare aiohttp and bare torchrun on this machine: `python -m tests.benchmarks`.

What counts are the ratios: both sides are measured in the same run, in turns. A missed aim is reported and is no error.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks import footprint, plan, serving, startup
from tests.benchmarks.load import PYTHON, WRK, choose_generator
from tests.benchmarks.report import describe_machine, table
from tests.benchmarks.workspace import Workspace

if TYPE_CHECKING:
    from tests.benchmarks.report import Row


def main() -> None:
    """Runs all scenarios and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about a minute instead of five, noisier")
    parser.add_argument("--output", type=Path, help="write the table to this file, too")
    parser.add_argument("--generator", choices=(WRK, PYTHON), default=choose_generator(), help="default: %(default)s")
    arguments = parser.parse_args()
    chosen = (plan.quick if arguments.quick else plan.full)(arguments.generator)
    # As Ctrl-C does it: through the `with` statements, which end the programs and remove the folder.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    machine = describe_machine(chosen.generator, chosen.rounds, chosen.seconds)
    text = f"{machine}\n\n{table(run(chosen))}\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


def run(chosen: plan.Plan) -> list[Row]:
    """Every scenario."""
    rows: list[Row] = []
    with Workspace() as workspace:
        chosen.tell("starting the servers")
        with serving.servers(workspace) as up:
            rows += serving.measure(chosen, up)
            rows += footprint.measure(chosen, up.pid)
        rows += startup.measure(chosen, workspace)
    return rows


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
