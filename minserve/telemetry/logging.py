"""The server's log: one line an event, on stderr. Nothing above DEBUG is written per request."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Writes to whatever sys.stderr is at the moment: the live view on a terminal puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure(level: str) -> None:
    """Sets the level of minserve's own loggers; libraries speak from WARNING on."""
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("minserve").setLevel(level.upper())
