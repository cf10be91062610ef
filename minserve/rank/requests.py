"""The requests of a batch as a handler finds them in its context: ids and headers; status and headers of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.wire.messages import RequestMeta, decode_requests

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Requests:
    """Those of one batch. Most handlers look at none of them, so what is shown of them is made at the first look.

    Each batch has its own: a thread that an earlier batch has left behind must not touch the next one's. What is made is put
    down in one step, for two threads must not get different ones.

    Args:
        requests: as they came; None: this is none, the handler is being initialised.
    """

    _ids: dict[int, str] | None = None
    _processors: list[RequestProcessor] | None = None

    def __init__(self, requests: bytes | Sequence[RequestMeta] | None = None) -> None:
        self._requests = requests

    @property
    def ids(self) -> dict[int, str] | None:
        """By place in the batch; None where there is none."""
        if self._ids is None and self._requests is not None:
            vars(self).setdefault("_ids", {index: one.id for index, one in enumerate(self._decoded())})
        return self._ids

    @ids.setter
    def ids(self, ids: dict[int, str]) -> None:
        self._ids = ids

    @property
    def processors(self) -> list[RequestProcessor]:
        """One for each request."""
        made = self._processors
        if made is None:
            made = vars(self).setdefault("_processors", [*map(RequestProcessor, self._decoded())])
        return made

    @processors.setter
    def processors(self, processors: list[RequestProcessor]) -> None:
        self._processors = processors

    @property
    def plain(self) -> bool:
        """Whether nobody has looked at the processors, and so nobody has set a status or a header."""
        return self._processors is None

    def _decoded(self) -> Sequence[RequestMeta]:
        requests = self._requests
        if isinstance(requests, bytes):
            requests = self._requests = decode_requests(requests)
        return () if requests is None else requests


class RequestProcessor:
    """One request's headers, and the status and headers of its answer.

    Args:
        request: as it came, or (in authors' own tests) its headers.
    """

    def __init__(self, request: RequestMeta | Mapping[str, object]) -> None:
        self._headers: dict[str, object] | None = None
        if not isinstance(request, RequestMeta):
            self._headers = dict(request)
            request = RequestMeta("", (), ())
        self._meta = request
        self.status = 200
        self.phrase = ""
        self.response_headers: dict[str, str] = {}

    @property
    def headers(self) -> dict[str, object]:
        """The HTTP request headers, names as the client wrote them, plus TorchServe's own.

        Decoded on first use: few handlers look at them.
        """
        if self._headers is None:
            headers: dict[str, object] = {
                name.decode("latin-1"): value.decode("utf-8", "surrogateescape") for name, value in self._meta.headers
            }
            for part in self._meta.parts:
                headers[part.name] = {"content-type": part.content_type}
            if self._meta.operation == "describe":
                headers["describe"] = "True"
            else:
                headers["url_path"] = self._meta.url_path
                headers["explain"] = str(self._meta.operation == "explain")
            self._headers = headers
        return self._headers

    def get_request_property(self, key: str) -> object:
        """A request header; the name as the client wrote it wins over one that differs in case only."""
        headers = self.headers
        if key in headers:
            return headers[key]
        lower = key.lower()
        return next((value for name, value in headers.items() if name.lower() == lower), None)

    def get_request_properties(self) -> dict[str, object]:
        """All request headers."""
        return self.headers

    def report_status(self, code: int, reason_phrase: str = "") -> None:
        """Sets the answer's HTTP status."""
        self.status = code
        self.phrase = reason_phrase or ""

    def get_response_status_code(self) -> int:
        """The answer's HTTP status."""
        return self.status

    def get_response_status_phrase(self) -> str:
        """The answer's reason phrase."""
        return self.phrase

    def add_response_property(self, key: str, value: str) -> None:
        """Sets a header of the answer, in the place of one whose name differs in case only."""
        self.response_headers.pop(self._spelling(key), None)
        self.response_headers[key] = value

    def get_response_headers(self) -> dict[str, str]:
        """The headers of the answer."""
        return self.response_headers

    def get_response_header(self, key: str) -> str | None:
        """One header of the answer, however its name is spelt."""
        return self.response_headers.get(self._spelling(key))

    def _spelling(self, key: str) -> str:
        lower = str(key).lower()  # what is no text is refused when the answer is sent
        return next((name for name in self.response_headers if str(name).lower() == lower), key)
