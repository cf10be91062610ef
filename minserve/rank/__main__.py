"""The life of a rank, from torchrun's exec to its end: prepare, connect, load, serve."""

from __future__ import annotations

import os
import sys

from minserve.rank import process, vitals
from minserve.rank.connection import Connection
from minserve.rank.loop import Rank


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
    code = process.run_to_the_end(Rank(launch, connection, slot).run)
    if connection.lost:
        process.end_the_group()
    # The server shall see this rank's end as one event: its socket stays open until the kernel closes it.
    connection.socket.detach()
    sys.exit(code)


if __name__ == "__main__":
    main()
