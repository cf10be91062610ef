"""Answers with the size of the body: what it costs to bring a large one to every rank."""

from __future__ import annotations

from typing import Any


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[str] | None:
    """Called once without data at load."""
    if data is None:
        return None
    return [str(len(row.get("data") or row["body"])) for row in data]
