"""Answers that are not the model's: one bad request must not fail the others in its batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minserve.rank.context import Context


def bad_request(context: Context, index: int, message: str) -> dict[str, object]:
    """Sets status 400 for one request of the batch and returns the body to put in its place in the list of answers.

    Args:
        context: the batch's context.
        index: the request's place in `data`.
        message: what the client should change.

    Returns:
        The same JSON object that minserve itself sends for an error.
    """
    context.set_response_status(400, "Bad Request", index)
    context.set_response_content_type(index, "application/json")
    return {"code": 400, "type": "BadRequestException", "message": message}
