"""The envelope that takes each request's body out of its dict."""

from __future__ import annotations

from typing import Any

from .base import BaseEnvelope


class BodyEnvelope(BaseEnvelope):
    """The handler gets a list of bodies."""

    def parse_input(self, data: Any) -> Any:
        """The field `data` or `body` of each request."""
        return [row.get("data") or row.get("body") for row in data]

    def format_output(self, data: Any) -> Any:
        """The answers as they are."""
        return data
