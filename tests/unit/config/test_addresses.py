import pytest

from minserve.config.addresses import Address, Role, parse_address


@pytest.mark.parametrize(
    ("text", "role", "address"),
    [
        ("http://127.0.0.1:8080", Role.INFERENCE, Address("127.0.0.1", 8080)),
        ("HTTPS://Host.example:1", Role.INFERENCE, Address("Host.example", 1, tls=True)),
        ("http://[::1]:0", Role.INFERENCE, Address("::1", 0)),
        ("http://0.0.0.0/", Role.INFERENCE, Address("0.0.0.0", 80)),
        ("https://0.0.0.0", Role.INFERENCE, Address("0.0.0.0", 443, tls=True)),
        ("http://a", Role.MANAGEMENT, Address("a", 8081)),
        ("https://a", Role.MANAGEMENT, Address("a", 8444, tls=True)),
        ("http://a", Role.METRICS, Address("a", 8082)),
        ("https://a", Role.METRICS, Address("a", 8445, tls=True)),
        ("unix:/tmp/my server.sock", Role.METRICS, Address(path="/tmp/my server.sock")),
    ],
)
def test_addresses_as_torchserve_writes_them(text: str, role: Role, address: Address) -> None:
    assert parse_address(text, role) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", "127.0.0.1:8080", "ftp://a", "http://", "http://:80", "http://a:", "http://a:65536", "http://a:b"),
        *("http://a/path", "http://user@a", "http://::1:80", "http://a?b", "unix:relative", "unix:/", "unix:/folder/"),
        "unix:/" + "x" * 107,
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_address(text, Role.INFERENCE)


def test_an_address_as_a_client_writes_it() -> None:
    assert Address("::1", 80, tls=True).url == "https://[::1]:80"
    assert Address("a", 80).url == "http://a:80"
    assert Address(path="/a").url == "unix:/a"
