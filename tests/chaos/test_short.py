"""The chaos run in small, for CI: every limit is generous here, `make chaos` measures them."""

from __future__ import annotations

import asyncio
import faulthandler
import os

from tests.chaos import report
from tests.chaos.catalogue import SHORT
from tests.chaos.run import Options, run
from tests.chaos.schedule import plan
from tests.chaos.soak import soak

SEED = int(os.environ.get("CHAOS_SEED", "4"))
TOLERANCE_S = 10.0  # a machine that is busy with other things


def test_every_request_is_answered_and_nothing_is_left_whatever_fails() -> None:
    faulthandler.cancel_dump_traceback_later()  # pytest's, for tests that hang: this one takes a minute
    injections = plan(SEED, SHORT, restarting=16, others=25)  # each of those that cost no restart comes once
    options = Options(SEED, SHORT, injections, server_kills=1, tolerance_s=TOLERANCE_S)
    ledger = asyncio.run(run(options))
    print(f"seed {SEED}\n{report.table(ledger)}")
    assert not ledger.breaches, report.breaches(ledger.breaches)
    assert sum(injection.fault.restarting for injection in injections) >= 15
    assert sum(row.count for row in ledger.rows.values()) >= len(injections)
    assert sum(row.wrong for row in ledger.rows.values()) == 0


def test_a_short_soak_finds_nothing_that_grows() -> None:
    ledger, tables = asyncio.run(soak(SEED, requests=4000, restarts=12, tolerance_s=TOLERANCE_S))
    print(tables)
    assert not ledger.breaches, report.breaches(ledger.breaches)
