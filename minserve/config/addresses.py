"""Addresses to listen on, as TorchServe writes them: `http://host:port`, `https://host:port` or `unix:/path`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field

_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?:\[(?P<ipv6>[0-9a-f:.%]+)\]|(?P<host>[^\s:/@?#\[\]]+))(?::(?P<port>[0-9]{1,5}))?/?"
    r"|unix:(?P<path>/[^\0]*[^\0/])",
    re.IGNORECASE,
)
UNIX_PATH_BYTES = 107  # the kernel's limit for the path of a socket, without the closing zero


class Role(StrEnum):
    """What an address is for."""

    INFERENCE = "inference"
    MANAGEMENT = "management"
    METRICS = "metrics"


# Ports of an address that names none: of http, and of https.
DEFAULT_PORTS = {Role.INFERENCE: (80, 443), Role.MANAGEMENT: (8081, 8444), Role.METRICS: (8082, 8445)}


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen.

    Attributes:
        host: name or address, without brackets; "" for a unix socket.
        port: 0: a free one.
        tls: over TLS.
        path: of a unix socket, absolute; "" for tcp.
    """

    host: str = ""
    port: int = 0
    tls: bool = False
    path: str = ""

    @property
    def url(self) -> str:
        """As a client writes it."""
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}"


def parse_address(text: str, role: Role) -> Address:
    """Reads an address; one without a port has the usual one of its role.

    Raises:
        ValueError: it is none.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError("not an address to listen on")
    if match["path"]:
        if len(match["path"].encode()) > UNIX_PATH_BYTES:
            raise ValueError(f"a socket's path of more than {UNIX_PATH_BYTES} bytes")
        return Address(path=match["path"])
    tls = match["scheme"].lower() == "https"
    port = int(match["port"]) if match["port"] else DEFAULT_PORTS[role][tls]
    if port > 65535:
        raise ValueError("no such port")
    return Address(match["ipv6"] or match["host"], port, tls)


def _checked(text: str) -> str:
    if text:
        parse_address(text, Role.INFERENCE)
    return text


AddressText = Annotated[
    str,
    AfterValidator(_checked),
    Field(title="http://HOST[:PORT] or https://HOST[:PORT] or unix:/PATH with a path of at most 107 bytes"),
]
