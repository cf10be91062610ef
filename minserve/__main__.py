"""The `minserve` command, also as `python -m minserve`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Runs the command line.

    Importing it takes a few hundred milliseconds, in which nothing runs yet: a SIGTERM or Ctrl-C then ends in 0 like later
    ones, which the server takes over. Commands other than start take it back.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    from minserve.cli import app

    app()


if __name__ == "__main__":
    main()
