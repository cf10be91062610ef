"""What went wrong in a rank, sorted so that the server can tell a cause from its victims.

Called by the loop for every exception that leaves a handler. Nothing here imports torch: a device or collective error can
only exist once the handler has imported it, so `sys.modules` is asked.
"""

from __future__ import annotations

import re
import sys
import traceback

from minserve.wire.messages import Failure

MAX_TRACEBACK = 64 * 1024  # characters; the end of a traceback is what tells
# Such as "[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer".
_BACKEND_TEXT = re.compile(r"\[\S*gloo/\S+:\d+\] |NCCL ")
# Where torch raises again what a function that it called on another rank has raised there.
_REMOTE = "torch/distributed/rpc/internal.py"
MAX_TEXT = 2000  # characters of an exception's text that reach a client
# TorchScript puts a traceback of its own into an exception's text, before the sentence that says what is wrong.
_SCRIPTED = re.compile(r"\.?\s*\nTraceback of TorchScript.*\n(?=[\w.]+: )", re.DOTALL)


class StageError(Exception):
    """A pipeline stage raised, and the pipeline helper has told every rank that waits for that stage.

    Raised on the rank whose stage failed and on every rank that received the failure in place of an activation. All of
    them have left the batch in step, so the worker goes on, provided that every rank in `needs` reports the same failure.

    Attributes:
        status: HTTP status that the exception asks for, 0 for none.
        origin: rank whose stage raised first.
        type_name: class name of the first exception.
        text: its text.
        place: `file:line` where it was raised.
        needs: ranks that must report this same failure before the server may call it ordinary: the ranks of the first
            stage, where the failure ends up. With tensor parallelism inside the stages this proves that all columns failed.
    """

    def __init__(
        self, origin: int, type_name: str, text: str, place: str, needs: tuple[int, ...], status: int = 0
    ) -> None:
        super().__init__(f"{type_name}: {text}")
        self.origin = origin
        self.type_name = type_name
        self.text = text
        self.place = place
        self.needs = needs
        self.status = status


_left_out: list[object] = []  # process groups


def leave_out(group: object) -> None:
    """What goes over this group is minserve's own, and is not to count as issued by the handler."""
    _left_out.append(group)


def issued_collectives() -> int:
    """How many collectives this process has issued, over all its groups that count; 0 while there is none.

    torch counts them for its own checks. Without that count, in a torch to come, type and place of a failure alone tell.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None:
        return 0
    try:
        # A copy: the heartbeat's thread asks, too, while the handler makes groups. Empty before there is any.
        issued = 0
        for group in list(dist.distributed_c10d._world.pg_map):
            if group not in _left_out:
                issued += group._get_sequence_number_for_group()
        return issued
    except Exception:
        return 0


def describe(error: BaseException, rank: int, world_size: int, collectives: int = 0) -> Failure:
    """An exception as the server needs it.

    Ranks that fail alike report the same type and place after the same number of collectives; by that the server knows them
    to be in step.
    """
    trace = _sendable("".join(traceback.format_exception(error))[-MAX_TRACEBACK:])
    if isinstance(error, StageError):
        return Failure(
            "own", error.type_name, _sendable(error.text), error.place, trace, error.origin, error.needs, error.status
        )
    return Failure(
        kind=_kind(error),
        type_name=type(error).__name__,
        text=_SCRIPTED.sub(": ", _text(error)).rstrip()[:MAX_TEXT],
        place=place_of(error),
        traceback=trace,
        origin=rank,
        needs=tuple(range(world_size)),
        status=_status(error),
        collectives=collectives,
    )


def place_of(error: BaseException) -> str:
    """`file:line` where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    return f"{frames[-1].filename}:{frames[-1].lineno}"


def _kind(error: BaseException) -> str:
    torch = sys.modules.get("torch")
    # The text is that of torch before it had a class for it, and of libraries that still go by it.
    if (
        isinstance(error, MemoryError)
        or _is(error, torch, "OutOfMemoryError")
        or _text(error).startswith("CUDA out of")
    ):
        return "memory"
    # By its beginning: elsewhere in the text may stand whatever a client has sent.
    if _is(error, torch, "AcceleratorError") or _text(error).startswith("CUDA error"):
        return "device"
    return "collective" if is_collective(error) else "own"


def _is(error: BaseException, module: object, name: str) -> bool:
    """Whether it is an exception that torch defines, in the versions of torch that do."""
    kind = getattr(module, name, None)
    return isinstance(kind, type) and isinstance(error, kind)


def is_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised it, so that the rank may be a victim and the group is dead.

    gloo raises plain RuntimeErrors: only their place, or how their text begins, tells them from a handler's own.
    """
    if _is(error, sys.modules.get("torch.distributed"), "DistError"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if frames and frames[-1].filename.endswith(_REMOTE):
        return False
    if frames and "torch/distributed/" in frames[-1].filename:
        return True
    return type(error) is RuntimeError and _BACKEND_TEXT.match(_text(error)) is not None


def _status(error: BaseException) -> int:
    """The HTTP status of a PredictionException, or of any exception that carries one as `error_code`."""
    try:
        code = getattr(error, "error_code", 0)
    except Exception:
        return 0
    return int(code) if isinstance(code, int) and 400 <= code <= 599 else 0  # an HTTPStatus is an int


def _text(error: BaseException) -> str:
    """Its text, for a client may have put anything into it and an author anything into `__str__`."""
    try:
        return _sendable(str(error))
    except Exception:
        return "(its text cannot be had: __str__ raised)"


def _sendable(text: str) -> str:
    """Text with its lone surrogates spelled out: they come with clients' headers and JSON, and have no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
