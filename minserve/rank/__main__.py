"""The life of a rank, from torchrun's exec to its end: prepare, connect, load, serve."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from minserve.rank import process, vitals
from minserve.rank.connection import Connection, Disconnected
from minserve.rank.loop import Rank
from minserve.rank.memory import open_memory

if TYPE_CHECKING:
    from minserve.rank.process import Launch
    from minserve.wire.board import Slot


def main() -> None:
    """Runs one rank."""
    process.die_with_the_agent()
    launch = process.read_environment(os.environ)
    process.redirect_output(launch)
    process.configure_logging(launch)
    # Connect before anything imports torch: that takes seconds, and the server would rather know at once that we live.
    connection = Connection(process.connect(launch))
    slot = vitals.show(launch)  # before HELLO: from then on the server may ask for stacks
    connection.hello(launch)
    process.exit_when_the_server_is_gone(connection.socket)
    code = process.run_to_the_end(lambda: _serve(launch, connection, slot))
    if connection.lost:
        process.end_the_group()
    # The server shall see this rank's end as one event: its socket stays open until the kernel closes it.
    connection.socket.detach()
    sys.exit(code)


def _serve(launch: Launch, connection: Connection, slot: Slot) -> int:
    try:
        shared, connection.replies = open_memory(connection.receive_memory(), launch.rank, launch.world_size)
    except Disconnected:
        return 0
    return Rank(launch, connection, slot, shared).run()


if __name__ == "__main__":
    main()
