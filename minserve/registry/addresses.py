"""Which addresses a model may be fetched from: `allowed_urls`, and never this machine's own network unless it is named.

A server that fetches what a client asks for is a way into the network that it stands in. So a name is resolved once, every
address behind it is looked at, and those addresses are what is connected to: it cannot mean something else a moment later.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from minserve.errors import ConfigError

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Forbidden(ValueError):
    """An address that no model is fetched from; the text is for the log."""


def matching_patterns(url: str, allowed_urls: Sequence[str]) -> list[str]:
    """The patterns that match the whole address, in capitals or not.

    Raises:
        ConfigError: a pattern is no regular expression.
    """
    matching = []
    for pattern in allowed_urls:
        try:
            if re.fullmatch(pattern, url, re.IGNORECASE):
                matching.append(pattern)
        except re.error as error:
            raise ConfigError(f"allowed_urls: {pattern!r} is no regular expression: {error}") from None
    return matching


def names_host(pattern: str, host: str) -> bool:
    """Whether a pattern has a host in it word for word, right after `://`: only then may that be a private one."""
    literal = re.escape(f"[{host}]" if ":" in host else host)
    plain = re.sub(r"\\(?=[^\w\s])", "", pattern)  # `10\.0\.0\.5` is as literal as it gets
    return re.search(rf"://{literal}(?![\w-]|\.\w)", plain, re.IGNORECASE) is not None


def check_address(host: str, address: str) -> None:
    """Refuses what is not on the public internet.

    Raises:
        Forbidden: it is a private, loopback, link-local or other special address.
        ValueError: it is none in its usual form.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):  # an IPv4 address may hide in it
        hidden = ip.ipv4_mapped or ip.sixtofour
        if hidden is None and ip in _NAT64:
            hidden = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        ip = hidden or ip
    if not ip.is_global or ip.is_multicast:
        raise Forbidden(
            f"{host} is {address}, a private or special address, and no pattern of allowed_urls names {host}"
        )


def is_ip(host: str) -> bool:
    """Whether a host is an address already, or what aiohttp takes for one (`127.1`, say), which nothing resolves."""
    return ":" in host or host.replace(".", "").isdigit()


class CheckedResolver(AbstractResolver):
    """Resolves names to public addresses only, and to any for the one host that a pattern names."""

    def __init__(self, named_host: str | None, resolver: AbstractResolver | None = None) -> None:
        self._named_host = named_host
        self._resolver = resolver or ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of a host.

        Raises:
            Forbidden: one of them is not public; a name that is partly here is not to be trusted.
            OSError: there is none.
        """
        found = await self._resolver.resolve(host, port, family)
        if host != self._named_host:
            for address in found:
                check_address(host, address["host"])
        return found

    async def close(self) -> None:
        """Closes the resolver that it asks."""
        await self._resolver.close()
