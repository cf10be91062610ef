"""Where a model comes from."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from minserve.registry.registration import Registration
from minserve.registry.store import Location

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from, so that it can be read again.

    Attributes:
        registration: what was asked for; None at the start of the server.
        downloaded: the file was fetched into the store for this registration, and goes with it.
    """

    location: Location
    registration: Registration | None = None
    downloaded: bool = False

    def discard(self) -> None:
        """Removes the file if it was fetched for this registration."""
        if self.downloaded:
            try:
                self.location.path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s: cannot be removed: %s", self.location.path, error.strerror)
