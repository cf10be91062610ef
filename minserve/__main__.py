"""The `minserve` command, also as `python -m minserve`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Runs the command line.

    Importing it takes a few hundred milliseconds, in which nothing runs yet: a SIGTERM or Ctrl-C then ends in 0 like later
    ones, which the server takes over. Commands other than start take it back. Not `sys.exit`: an exception may fall into a
    place that swallows it, such as the callback of a weak reference.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    from minserve.cli import app

    app()


if __name__ == "__main__":
    main()
