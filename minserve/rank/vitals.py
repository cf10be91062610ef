"""Signs of life that need nobody's help: a heartbeat on the board, and this rank's Python stacks when the server asks.

Both are for the case that the main thread answers nothing. The heartbeat stands still while a rank is stopped or C code
holds the GIL; the stacks come in both cases but the first, for faulthandler writes them from the signal's handler.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from typing import TYPE_CHECKING

from minserve.rank.failures import issued_collectives
from minserve.wire.board import HEARTBEAT_S, STACK_SIGNAL, Slot

if TYPE_CHECKING:
    from minserve.rank.process import Launch


def show(launch: Launch) -> Slot:
    """Begins to show them, and returns this rank's slot on the board for the loop to write its progress in."""
    # Not closed: faulthandler writes into it for the life of the process.
    file = (launch.directory / f"stack.{launch.local_rank}").open("wb", buffering=0)
    faulthandler.register(STACK_SIGNAL, file, all_threads=True)
    slot = Slot(launch.directory / "board", launch.local_rank)
    threading.Thread(target=_beat, args=(slot,), name="minserve-heartbeat", daemon=True).start()
    return slot


def _beat(slot: Slot) -> None:
    while True:
        slot.beat(issued_collectives())
        time.sleep(HEARTBEAT_S)
