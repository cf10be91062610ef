import os

import pytest

from minserve.errors import Unavailable
from minserve.frontend.admission import InFlightBytes
from minserve.frontends.shared import Shared


def test_what_one_process_writes_the_others_read() -> None:
    ours = Shared.create(3)
    theirs = Shared(os.dup(ours.descriptor))
    theirs.in_flight[1], theirs.connections[2] = 7, 9
    assert [*ours.in_flight] == [0, 7, 0]
    assert [*ours.connections] == [0, 0, 9]
    ours.forget(1)
    assert [*theirs.in_flight] == [0, 0, 0]


def test_the_bytes_of_all_processes_count_for_the_limit() -> None:
    shared = Shared.create(2)
    first, second = (InFlightBytes(10, shared.in_flight, own) for own in (0, 1))
    held = first.share()
    held.grow(7)
    with pytest.raises(Unavailable, match="have 7 bytes, 4 more would exceed"):
        second.share().grow(4)
    held.give_back()
    second.share().grow(4)
    assert first.used == 4
