import os
import socket
import stat
from pathlib import Path

import pytest

from minserve.config.addresses import Address, Role
from minserve.config.server import ServerOptions
from minserve.errors import StartupError
from minserve.frontend.listeners import Place, bind_all, places


def wanted(**options: object) -> list[tuple[set[Role], str, str]]:
    found = places(ServerOptions.model_validate(options))
    return [(set(place.roles), place.address.url, place.option) for place in found]


def unix(path: Path) -> Place:
    return Place(frozenset({Role.MANAGEMENT}), Address(path=str(path)), "management_address")


def test_three_addresses_by_host_and_port() -> None:
    assert wanted(host="::1", management_port=0) == [
        ({Role.INFERENCE}, "http://[::1]:8080", "--inference-port"),
        ({Role.MANAGEMENT}, "http://[::1]:0", "--management-port"),
        ({Role.METRICS}, "http://[::1]:8082", "--metrics-port"),
    ]


def test_an_address_stands_over_host_and_port() -> None:
    assert wanted(inference_address="https://a", metrics_address="unix:/m", management_port=1) == [
        ({Role.INFERENCE}, "https://a:443", "inference_address"),
        ({Role.MANAGEMENT}, "http://127.0.0.1:1", "--management-port"),
        ({Role.METRICS}, "unix:/m", "metrics_address"),
    ]


@pytest.mark.parametrize("address", ["http://a:1", "https://a:1", "unix:/s"])
def test_the_same_address_twice_is_one_listener(address: str) -> None:
    both = {"inference_address": address, "management_address": address}
    shared = ({Role.INFERENCE, Role.MANAGEMENT}, address, "inference_address")
    assert wanted(**both, enable_metrics_api=False) == [shared]
    assert wanted(**both, metrics_address=address) == [(set(Role), address, "inference_address")]
    assert wanted(**both)[0] == shared


def test_free_ports_are_never_the_same_address() -> None:
    assert len(wanted(inference_port=0, management_port=0, metrics_port=0)) == 3


def test_metrics_on_the_address_of_one_of_the_others_is_an_error() -> None:
    with pytest.raises(
        StartupError, match=r"^--metrics-port: found http://127.0.0.1:8081, which --management-port has"
    ):
        wanted(metrics_port=8081)


def test_a_listener_knows_the_port_that_it_has_got() -> None:
    (listener,) = bind_all([Place(frozenset({Role.METRICS}), Address("127.0.0.1", 0), "--metrics-port")])
    assert listener.address == Address("127.0.0.1", listener.socket.getsockname()[1])
    listener.close()


def test_all_are_bound_or_none(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "none" / "second"
    with pytest.raises(
        StartupError, match=r"cannot listen on unix:.*second: No such file .*; management_address chooses"
    ):
        bind_all([unix(first), unix(second)])
    assert not first.exists()


def test_a_unix_socket_is_for_its_user_alone_and_goes_with_its_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    (listener,) = bind_all([unix(path)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()
    assert not path.exists()


def test_the_file_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    (listener,) = bind_all([unix(path)])
    listener.close()


def test_the_socket_of_a_live_server_and_a_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "s"
    (live,) = bind_all([unix(path)])
    with pytest.raises(StartupError, match="a server listens on it"):
        bind_all([unix(path)])
    assert path.exists()
    os.rename(path, tmp_path / "moved")
    path.write_text("precious")
    with pytest.raises(StartupError, match="it is no socket"):
        bind_all([unix(path)])
    live.close()
    assert path.read_text() == "precious", "the name is another's by now"
