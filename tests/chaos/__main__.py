"""Makes real rank groups fail under load, and checks that every client gets what it is due: `python -m tests.chaos`.

Prints its seed, with which the same faults happen to the same models again. Ends with the table, and with 1 on any breach.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from pathlib import Path

from tests.chaos import report
from tests.chaos.catalogue import FULL, SHORT
from tests.chaos.run import Options, run
from tests.chaos.schedule import describe, plan

SHARE_OF_RESTARTS = 1 / 3


def main() -> int:
    """Runs, reports; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=300, metavar="N", help="how many (%(default)s); a third restart")
    parser.add_argument("--seed", type=int, default=None, help="of a run that is to be repeated")
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults with this in their name")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no fault after so long (%(default)s)")
    parser.add_argument("--short", action="store_true", help="six models instead of eleven")
    parser.add_argument("--models", default="", help="only these, separated by commas")
    parser.add_argument("--kills", type=int, default=3, help="of the server itself (%(default)s)")
    parser.add_argument("--at-once", type=int, default=2, help="workers that restart at one time (%(default)s)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="S",
        help="later than its limit by more than this is a breach (%(default)s)",
    )
    parser.add_argument("--list", action="store_true", help="print the schedule and end")
    parser.add_argument("--report", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args()

    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    models = SHORT if arguments.short else FULL
    if arguments.models:
        models = tuple(model for model in models if model.name in arguments.models.split(","))
    restarting = round(arguments.faults * SHARE_OF_RESTARTS)
    injections = plan(seed, models, restarting, arguments.faults - restarting, arguments.only)
    head = f"seed {seed}: {describe(injections)}; tolerance {arguments.tolerance:g} s; {report.machine()}"
    print(head, flush=True)
    if arguments.list:
        print("\n".join(map(str, injections)))
        return 0

    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    # As Ctrl-C does it: through the `finally` that ends the server and removes its folder.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    options = Options(
        *(seed, models, injections, arguments.at_once, arguments.kills, arguments.tolerance),
        until=began + arguments.minutes * 60,
        tell=tell,
    )
    ledger = asyncio.run(run(options))
    text = f"{head}, {time.monotonic() - began:.0f} s\n\n{report.table(ledger)}\n"
    if ledger.breaches:
        text += f"\n{len(ledger.breaches)} breaches\n\n{report.breaches(ledger.breaches)}\n"
    print(f"\n{text}")
    if arguments.report:
        arguments.report.write_text(text)
    return 1 if ledger.breaches else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
