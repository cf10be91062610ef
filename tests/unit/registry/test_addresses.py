import re
import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from minserve.errors import ConfigError
from minserve.registry.addresses import (
    CheckedResolver,
    Forbidden,
    check_address,
    is_ip,
    matching_patterns,
    names_host,
)


def test_a_pattern_matches_the_whole_address_in_capitals_or_not() -> None:
    patterns = ["https://models.example/.*", r"file:///srv/models/[^/]+", "https?://.*"]
    assert matching_patterns("HTTPS://Models.example/a.mar", patterns) == [patterns[0], patterns[2]]
    assert matching_patterns("https://models.example", patterns[:1]) == []
    assert matching_patterns("x-https://models.example/a.mar", patterns) == []
    with pytest.raises(ConfigError, match=r"allowed_urls: '\(' is no regular expression"):
        matching_patterns("https://models.example/", ["("])


@pytest.mark.parametrize(
    ("pattern", "host", "named"),
    [
        ("http://10.0.0.5/.*", "10.0.0.5", True),
        (r"https?://10\.0\.0\.5(:\d+)?/.*", "10.0.0.5", True),
        ("http(s)?://localhost.*", "localhost", True),
        (r"http://\[::1\]:8000/.*", "::1", True),
        ("https?://.*", "localhost", False),
        (".*", "10.0.0.5", False),
        ("http://10.0.0.50/.*", "10.0.0.5", False),
        ("http://localhost.example/.*", "localhost", False),
        ("http://models.example/localhost", "localhost", False),
        ("http://(localhost|models.example)/.*", "localhost", False),
    ],
)
def test_a_host_is_named_right_behind_the_scheme_or_not_at_all(pattern: str, host: str, named: bool) -> None:
    assert names_host(pattern, host) is named


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.1.2.3",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "169.254.169.254",
        ),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1", "ff02::1"),
        *("::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1"),  # an IPv4 address in disguise
    ],
)
def test_what_is_not_on_the_public_internet_is_refused(address: str) -> None:
    with pytest.raises(Forbidden, match="no pattern of allowed_urls names"):
        check_address("models.example", address)


def test_public_addresses_are_not() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34"):
        check_address("models.example", address)


class FakeResolver(AbstractResolver):
    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address in self.addresses
        ]

    async def close(self) -> None:
        pass


def test_what_aiohttp_takes_for_an_address_and_does_not_resolve_is_looked_at_as_one() -> None:
    for host in ("127.1", "2130706433", "017700000001", "127.0.0.1.", "0"):
        assert is_ip(host)
        with pytest.raises(ValueError, match=re.escape(host)):
            check_address(host, host)
    assert not is_ip("10.models.example")


@pytest.mark.asyncio
async def test_one_private_address_among_a_names_addresses_is_too_many() -> None:
    with pytest.raises(Forbidden, match="a private or special address"):
        await CheckedResolver(None, FakeResolver("93.184.216.34", "10.0.0.1")).resolve("models.example", 443)
    public = CheckedResolver(None, FakeResolver("93.184.216.34"))
    assert [found["host"] for found in await public.resolve("models.example", 443)] == ["93.184.216.34"]
    named = CheckedResolver("models.example", FakeResolver("10.0.0.1"))
    assert [found["host"] for found in await named.resolve("models.example", 443)] == ["10.0.0.1"]
