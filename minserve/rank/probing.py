"""The handler's own check of its health."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minserve.rank.loading import Handler


class ProbeFailed(Exception):
    """The handler's probe says that this rank is not healthy."""


def run_probe(handler: Handler) -> list[object]:
    """Runs it; the answer to a probe has no requests and so no answers.

    Raises:
        ProbeFailed: the rank is not healthy.
    """
    healthy = handler.probe() if handler.probe is not None else True
    if healthy not in (True, None):
        raise ProbeFailed(f"probe() answered {healthy!r}; True or None means healthy")
    return []
