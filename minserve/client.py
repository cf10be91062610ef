"""The command line's way to a server's management address: http, https or a unix socket; never by a proxy."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from contextlib import closing
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from minserve.errors import MinServeError


class NoAnswer(MinServeError):
    """The server does not answer, or by an error."""


@dataclass(frozen=True, slots=True)
class Client:
    """Where a server is, and how to know it.

    Attributes:
        url: `http://host:port`, `https://host:port` or `unix:/path`.
        certificate: with https the server's own, in PEM; "": it has one that an authority has signed.
        token: for the Authorization header; "": none.
    """

    url: str
    certificate: str = ""
    token: str = field(default="", repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """Those that each request needs."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        """A connection, not yet made; `timeout` is in seconds, for each step."""
        if self.url.startswith("unix:"):
            return _UnixConnection(self.url.removeprefix("unix:"), timeout)
        where = urlsplit(self.url)
        host, port = where.hostname or "", where.port
        if where.scheme != "https":
            return http.client.HTTPConnection(host, port, timeout=timeout)
        context = ssl.create_default_context(cadata=self.certificate or None)
        if self.certificate:  # of this very server, whatever name it is called by
            context.check_hostname = False
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=context)

    def get(self, path: str, timeout: float) -> object:
        """The JSON that a GET answers.

        Raises:
            NoAnswer: there is no server, or it answers by an error, or by no JSON.
        """
        try:
            with closing(self.connection(timeout)) as link:
                link.request("GET", path, headers=self.headers)
                answer = link.getresponse()
                content = answer.read()
            if answer.status != http.client.OK:
                raise NoAnswer(f"{self.url}: {error_text(content) or f'{answer.status} {answer.reason}'}")
            return json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NoAnswer(f"no answer from {self.url}: {error}") from None


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def error_text(content: bytes) -> str:
    """The message in an error's JSON; "" if it is none."""
    try:
        return str(json.loads(content)["message"])
    except (ValueError, KeyError, TypeError):
        return ""
