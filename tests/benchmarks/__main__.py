"""Measures minserve beside TorchServe, other servers, and the floors below them: `python -m tests.benchmarks`.

What counts are the ratios: all sides are measured in the same run, in turns. A missed aim is reported and is no error. A
peer that cannot be had, or fails, is named under the table. Exit code 1: something of minserve's failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks import plan
from tests.benchmarks.load import PYTHON, WRK, choose_generator
from tests.benchmarks.peers.environments import CONSTRAINTS, PEERS, Environments
from tests.benchmarks.plot import draw
from tests.benchmarks.publish import headlines, page, publish
from tests.benchmarks.report import describe_machine, failure
from tests.benchmarks.run import Run
from tests.benchmarks.scenarios import SCENARIOS
from tests.benchmarks.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.benchmarks.plot import Panel
    from tests.benchmarks.report import Row

TABLE, PLOT = "benchmarks.md", "benchmarks.svg"


@dataclass(slots=True)
class Result:
    """What all scenarios have found."""

    rows: list[Row] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)
    failed: bool = False


def main() -> None:
    """Runs the scenarios, prints the table, and keeps it if asked to."""
    arguments = _arguments()
    chosen = (plan.quick if arguments.quick else plan.full)(arguments.generator)
    # As Ctrl-C does it: through the `with` statements, which end the programs and remove the folder.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    machine, began = describe_machine(chosen), time.monotonic()
    environments = Environments(tuple(arguments.peers), dict(arguments.environment), arguments.constraints)
    with Workspace() as workspace:
        run = Run(chosen, workspace, environments)
        result = measure(run, arguments.only)
    chosen.tell(f"{(time.monotonic() - began) / 60:.1f} minutes")
    text = page(machine, result.rows, result.footnotes, run.notes)
    print(text)
    if arguments.write:
        publish(text, headlines(machine, result.rows, result.footnotes), draw(result.panels))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / TABLE).write_text(f"{text}\n")
        (arguments.output / PLOT).write_text(draw(result.panels))
    sys.exit(result.failed)


def measure(run: Run, names: Sequence[str]) -> Result:
    """The scenarios, one after the other; one that fails has a row that says so."""
    result = Result()
    for name in names:
        run.plan.tell(f"== {name}")
        try:
            findings = SCENARIOS[name](run)
        except Exception as error:
            traceback.print_exc()
            result.rows.append(failure(name, error))
            result.failed = True
        else:
            result.rows += findings.rows
            result.panels += findings.panels
            result.footnotes += findings.footnotes
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME", default=list(SCENARIOS), choices=SCENARIOS, help=", ".join(SCENARIOS))
    add("--quick", action="store_true", help="a few minutes, noisier, fewer points, no peers")
    add("--peers", nargs="*", choices=PEERS, help="default: all, with --quick none; each has an environment in .bench/")
    add("--environment", nargs=1, action="extend", type=_environment, default=[], metavar="PEER=FOLDER",
        help="a virtual environment that is there already")  # fmt: skip
    add("--constraints", type=Path, default=CONSTRAINTS, metavar="FILE", help="for pip, when it makes one")
    add("--generator", choices=(WRK, PYTHON), default=choose_generator(), help="default: %(default)s")
    add("--output", type=Path, metavar="FOLDER", help=f"write {TABLE} and {PLOT} there")
    add("--write", action="store_true", help="keep the run in docs/ and in the README")
    arguments = parser.parse_args()
    if arguments.peers is None:
        arguments.peers = () if arguments.quick else PEERS
    if arguments.write and (arguments.quick or len(arguments.only) < len(SCENARIOS)):
        parser.error("--write keeps whole runs only")
    return arguments


def _environment(text: str) -> tuple[str, Path]:
    peer, _, folder = text.partition("=")
    if peer not in PEERS or not (Path(folder) / "bin").is_dir():
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(PEERS)} and a folder with bin/, found {text!r}")
    return peer, Path(folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
