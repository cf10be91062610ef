"""What went wrong in a rank, sorted so that the server can tell a cause from its victims.

Called by the loop for every exception that leaves a handler. Nothing here imports torch: a device or collective error can
only exist once the handler has imported it, so `sys.modules` is asked.
"""

from __future__ import annotations


class StageError(Exception):
    """A pipeline stage raised, and the pipeline helper has told every rank that waits for that stage.

    Raised on the rank whose stage failed and on every rank that received the failure in place of an activation. All of
    them have left the batch in step, so the worker goes on, provided that every rank in `needs` reports the same failure.

    Attributes:
        origin: rank whose stage raised first.
        type_name: class name of the first exception.
        text: its text.
        place: `file:line` where it was raised.
        needs: ranks that must report this same failure before the server may call it ordinary: the ranks of the first
            stage, where the failure ends up. With tensor parallelism inside the stages this proves that all columns failed.
    """

    def __init__(self, origin: int, type_name: str, text: str, place: str, needs: tuple[int, ...]) -> None:
        super().__init__(f"{type_name}: {text}")
        self.origin = origin
        self.type_name = type_name
        self.text = text
        self.place = place
        self.needs = needs
