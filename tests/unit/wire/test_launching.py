import pytest

from minserve.errors import WireError
from minserve.wire.launching import Answer, Ready, Refused, Start, Started, decode_answer, decode_start, encode


def test_a_start_comes_as_it_was_sent_also_what_is_no_text() -> None:
    start = Start(("--nnodes", "1"), (b"A=1", b"B=\xff"), b"/models/\xff")
    assert decode_start(encode(start)) == start


@pytest.mark.parametrize("answer", [Ready(), Started(4711), Refused("no")])
def test_an_answer_comes_as_it_was_sent(answer: Answer) -> None:
    assert decode_answer(encode(answer)) == answer


@pytest.mark.parametrize("packet", [b"", b"\xc1", b"x", encode(Start((), (), b"/")), b'["started", 1]'])
def test_what_is_no_answer_is_an_error(packet: bytes) -> None:
    with pytest.raises(WireError, match="from the warm launcher"):
        decode_answer(packet)


def test_what_is_no_start_is_an_error() -> None:
    with pytest.raises(WireError, match="to the warm launcher"):
        decode_start(encode(Ready()))
