"""What envelopes have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class BaseEnvelope(ABC):
    """Stands around a handler: requests go through `parse_input`, answers through `format_output`.

    Args:
        handle_fn: the handler's entry.

    Attributes:
        context: of the batch.
    """

    def __init__(self, handle_fn: Callable[..., Any]) -> None:
        self._handle_fn = handle_fn
        self.context: Any = None

    def handle(self, data: Any, context: Any) -> Any:
        """Answers a batch; what is empty goes through as it is."""
        self.context = context
        results = self._handle_fn(self.parse_input(data) if data else data, context)
        return self.format_output(results) if results else results

    @abstractmethod
    def parse_input(self, data: Any) -> Any:
        """Turns the requests into what the handler takes."""

    @abstractmethod
    def format_output(self, data: Any) -> Any:
        """Turns what the handler gave into one answer a request."""
