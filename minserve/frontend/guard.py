"""Refuses what a browser sends on behalf of a foreign page to management, metrics and documentation.

A page from anywhere can make its visitor's browser send requests to this machine. Two headers, which no page can forge,
give that away: `Host`, when the page's own name was made to lead here (DNS rebinding), and `Origin`, when the page calls
across origins. The inference port is not restricted: there a balancer or a page may stand in front of it under any name.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, hdrs

from minserve.errors import BadRequest, Forbidden

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import web

    from minserve.frontend.cors import Cors

_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[0-9a-fA-F:.%]+)\]|(?P<host>[^\s:/@?#\[\]]+))(?::(?P<port>[0-9]{0,5}))?")
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<authority>[^/]+)")
_PORTS = {"http": "80", "https": "443"}
ANY = "*"


class Guard:
    """A check of where a request was sent to, and from which page.

    Allowed are this machine's loopback names and addresses, the host that the server was told to listen on, and
    `allowed_hosts`. A server that listens on more than loopback also answers to every address, since which of them lead to
    it through port mappings and proxies it cannot know, and a foreign name is no address; and to the machine's own name.

    Args:
        bound: the host that the server was told to listen on.
        allowed: further names, `.example.org` for all names below it, `*` for every name.
        cors: says whose pages may call, besides the server's own.
    """

    def __init__(self, bound: str, allowed: Sequence[str], cors: Cors) -> None:
        self._names = {bound.lower().rstrip("."), *(name.lower().rstrip(".") for name in allowed)}
        self._wide = not _is_loopback(bound.lower())
        if self._wide:
            self._names.add(socket.gethostname().lower())
        self._cors = cors

    def __call__(self, request: web.Request) -> None:
        """Lets a request pass.

        Raises:
            Forbidden: the host or the origin is a foreign one.
            BadRequest: HTTP/1.1 without a host.
        """
        hosts = request.headers.getall(hdrs.HOST, [])
        if not hosts and request.version >= HttpVersion11:
            raise BadRequest("bad request: no Host header")
        for host in hosts:
            self._check_host(host)
        target = request.url.authority if "://" in request.raw_path.partition("?")[0] else ""
        if target:  # a target with a host of its own stands above the header
            self._check_host(target)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and not self._cors.allows(origin) and not any(_same(origin, host) for host in hosts):
            raise Forbidden(
                f"Origin: found {origin[:100]!a}, allowed: this server's own pages and those of cors_allowed_origin"
            )

    def _check_host(self, authority: str) -> None:
        match = _AUTHORITY.fullmatch(authority)
        name = (match["ipv6"] or match["host"]).lower().rstrip(".") if match is not None else ""
        if not name or not (self._is_ours(name) or ANY in self._names):
            raise Forbidden(
                f"Host: found {authority[:100]!a}, allowed: loopback, the host that the server listens on, and the names in "
                "the server's option allowed_hosts"
            )

    def _is_ours(self, name: str) -> bool:
        if name in self._names or _is_loopback(name) or (self._wide and _is_address(name)):
            return True
        return any(name[dot:] in self._names for dot, letter in enumerate(name) if letter == ".")


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same(origin: str, host: str) -> bool:
    """Whether a page of an origin was served under a host: then it is ours, whatever maps ports or ends TLS between."""
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        return False
    usual = _PORTS[match["scheme"]]
    return match["authority"].removesuffix(f":{usual}") == host.lower().removesuffix(f":{usual}")
