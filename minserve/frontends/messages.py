"""What a frontend process and the server say to each other: the meta of each frame, see `wire.frames.Kind`.

The bodies of requests and answers lie behind the meta, as on the ranks' sockets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.errors import MinServeError
from minserve.wire.messages import Message, RequestMeta

if TYPE_CHECKING:
    from typing import Self


class Start(Message):
    """Meta of START.

    Attributes:
        number: this process's place among all of them.
        options: the server's, as JSON.
        certificate, key: in PEM; empty without TLS. `source` says where they are from.
        log_level: of minserve's loggers.
    """

    number: int
    options: str
    certificate: bytes
    key: bytes
    source: str
    log_level: int


# ── from a frontend process ──────────────────────────────────────────────────────────────────────────────────────────


class Ask(Message):
    """May this client send a request to a model? None stands for one that is not known yet."""

    model: str | None
    version: str
    authorization: str


class Submit(Message):
    """A request. Its bodies follow.

    Attributes:
        model: None stands for the only one that there is.
        version: "" for the default one.
        began, deadline: on the monotonic clock, which all processes of a machine share: when it was taken up, and until
            when its client wants an answer (infinite: the client does not say).
    """

    model: str | None
    version: str
    began: float
    deadline: float
    meta: RequestMeta


class Taken(Message):
    """The client of a stream has taken so many bytes more."""

    count: int


class Spent(Message):
    """Seconds that requests to a model spent in a frontend process: how many in each bucket, and the sum."""

    model: str | None
    version: str
    counts: tuple[int, ...]
    total: float


class Recorded(Message):
    """What was measured since the last one.

    Attributes:
        answers: how many, by status.
    """

    answers: dict[int, int]
    spent: tuple[Spent, ...]


class Log(Message):
    """A line for the log."""

    logger: str
    level: int
    text: str


# ── to a frontend process ────────────────────────────────────────────────────────────────────────────────────────────


class Allowed(Message):
    """The client may send its request, which then has so many seconds."""

    request_timeout: float


class Answered(Message):
    """Meta of ANSWER, whose body follows, and of STREAM, whose body are the chunks that have come.

    Attributes:
        stall_timeout: seconds for which a stream's client may take no byte.
        lengths: of a stream's chunks.
    """

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    stall_timeout: float = 0.0
    lengths: tuple[int, ...] = ()


class Piece(Message):
    """Meta of PIECE: the lengths of the chunks in its body."""

    lengths: tuple[int, ...]


class Refused(Message):
    """An error, as its client sees it."""

    status: int
    type_name: str
    retryable: bool
    retry_after: float | None
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """What to tell of an error. Only ours are meant for clients."""
        if not isinstance(error, MinServeError):
            error = MinServeError("Internal error; the log has its traceback")
        return cls(error.status, error.type_name, error.retryable, error.retry_after, str(error))


class ToldError(MinServeError):
    """An error that the server has told a frontend process."""

    def __init__(self, told: Refused) -> None:
        super().__init__(told.text)
        self.status = told.status
        self.type_name = told.type_name
        self.retryable = told.retryable
        self.retry_after = told.retry_after
