"""One request on its way past aiohttp: what is known of its head, the future of its answer, and what becomes of it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aiohttp.streams import EmptyStreamReader

from minserve.dispatch.request import Reply

if TYPE_CHECKING:
    from aiohttp.http import RawRequestMessage

    from minserve.dispatch.request import Request
    from minserve.frontend.admission import Share
    from minserve.frontend.lane import LaneHandler
    from minserve.frontend.models import Model

logger = logging.getLogger(__name__)

MOST_DIGITS = 7  # of a length that is small enough
Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(slots=True)
class Head:
    """The head of a request that may be carried.

    Attributes:
        text: its bytes.
        before, after: those around the digits of Content-Length.
        place: of that header among all.
        version: None where it names none.
        timeout: seconds that the client gives it; infinite where it says nothing.
        id: the client's own x-request-id; "" where it has none that will do.
    """

    text: bytes
    before: bytes
    after: bytes
    place: int
    message: RawRequestMessage
    model: str
    version: str | None
    content_type: str
    timeout: float
    id: str

    def again(self, data: bytes) -> tuple[int, int, Headers] | None:
        """What a request is that begins with this same head, but perhaps for the length.

        Returns:
            Where its body begins, how long that is to be, and the headers.
        """
        headers = self.message.raw_headers
        name, length = headers[self.place]
        if data.startswith(self.text):  # nearly all
            return len(self.text), int(length), headers
        at = len(self.before)
        end = data.find(b"\r", at, at + MOST_DIGITS + 1)
        if not data.startswith(self.before) or not data.startswith(self.after, end) or not data[at:end].isdigit():
            return None
        length = data[at:end]
        return end + len(self.after), int(length), (*headers[: self.place], (name, length), *headers[self.place + 1 :])


class Passage(asyncio.Future[Reply]):
    """One request that is carried: the future of its answer, which goes to the client at once when it is set.

    Attributes:
        asked: what the dispatcher has; its `reply` is this.
        began, since: when it came, on the clock of the meters and on the loop's.
        sent: bytes of its answer that have gone out already; only a stream is handed over with any.
    """

    __slots__ = ("asked", "began", "connection", "express", "head", "model", "sent", "share", "since")

    asked: Request

    def __init__(
        self,
        express: Carrier,
        connection: LaneHandler,
        head: Head,
        model: Model,
        share: Share,
        began: float,
        since: float,
    ) -> None:
        super().__init__(loop=connection._loop)
        self.express = express
        self.connection = connection
        self.head = head
        self.model = model
        self.share = share
        self.began = began
        self.since = since
        self.sent = 0

    def set_result(self, result: Reply, /) -> None:
        """The answer is there. Whoever sets it has other requests to answer: nothing may be raised here."""
        super().set_result(result)
        self._arrive()

    def set_exception(self, exception: type | BaseException, /) -> None:
        """The same for an error."""
        super().set_exception(exception)
        self._arrive()

    def _arrive(self) -> None:
        try:
            self.express.arrived(self)
        except Exception:
            logger.exception("%s %s: unforeseen", self.head.message.method, self.head.message.path)
            self.connection.force_close()

    def leave(self) -> None:
        """Nobody takes the answer any more."""
        self.cancel()
        self.model.dispatcher.withdraw(self.asked)
        self.model.dispatcher.finish(self.asked, answered=False)
        self.end()

    def end(self) -> None:
        """Lets go of the request: the two hold each other, which is work for the collector."""
        self.share.give_back()
        del self.asked


class Carrier(Protocol):
    """What decides and does it: `frontend.express`."""

    def read(self, message: RawRequestMessage, text: bytes) -> Head | None:
        """What is to be known of a head, and its bytes; None: its request cannot be carried."""

    def begin(self, connection: LaneHandler, head: Head, headers: Headers, body: bytes) -> bool:
        """Whether it carries a request. If not, nothing has happened to it."""

    def arrived(self, passage: Passage) -> None:
        """A passage has its answer or its error."""


class Carried(EmptyStreamReader):
    """The body of a request that is handed over: it was read long ago. Instead it has the outcome."""

    __slots__ = ("passage",)

    def __init__(self, passage: Passage) -> None:
        super().__init__()
        self.passage = passage
