import pytest

from minserve.playlist import choose, parse_range
from minserve.recording import RecordingError
from minserve.wire.messages import Part, RequestMeta
from minserve.wire.recording import AnyRecord, Ended, Gap, Header, Sent

META = RequestMeta("id", (), (Part("a", "", 2), Part("b", "", 0)))
EVERYTHING = parse_range(None)


def header(bodies: bool = True) -> Header:
    return Header("0.1.0", "m", "1.0", "m/0", 2, 4, bodies, 17.0)


def sent(seq: int, life: str = "m-0-aa", bodies: tuple[bytes, ...] | None = (b"xy", b"")) -> Sent:
    return Sent(life, seq, 18.0, (META,), bodies)


def ended(seq: int, error: str = "", life: str = "m-0-aa") -> Ended:
    return Ended(life, seq, 19.0, error)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [("3:5", 3, 5), ("3:3", 3, 3), ("3:", 3, 2**63), (":5", 1, 5), (":", 1, 2**63), ("7", 7, 7), (None, 1, 2**63)],
)
def test_a_range_has_both_its_ends(text: str | None, first: int, last: int) -> None:
    assert parse_range(text) == range(first, last + 1)


@pytest.mark.parametrize("text", ["", "a:b", "1:2:3", "-1", "5:3", "1 : 2", "٣"])
def test_what_is_no_range_is_told(text: str) -> None:
    with pytest.raises(RecordingError, match=r"seq: found .* allowed: "):
        parse_range(text)


def test_batches_come_in_order_with_how_they_ended() -> None:
    records: list[AnyRecord] = [header(), sent(1), sent(2), ended(2, "boom"), ended(1), sent(3)]
    playlist = choose(records, EVERYTHING, None)
    assert [(batch.seq, batch.error) for batch in playlist.batches] == [(1, ""), (2, "boom"), (3, None)]
    assert [batch.bodies for batch in playlist.batches] == [(b"xy", b"")] * 3
    assert playlist.notes == []


def test_zero_bytes_stand_for_bodies_that_were_not_kept() -> None:
    playlist = choose([header(bodies=False), sent(1, bodies=None)], EVERYTHING, None)
    assert [batch.bodies for batch in playlist.batches] == [(b"\0\0", b"")]
    assert playlist.notes == ["the bodies were not recorded: zero bytes of the same lengths stand for them"]


def test_what_is_missing_is_told() -> None:
    records: list[AnyRecord] = [header(), Gap(3), sent(4), Gap(2), sent(7), sent(8), Gap(5)]
    playlist = choose(records, EVERYTHING, None)
    assert playlist.notes == [
        "the recording begins with batch 4: what the ranks had done before is not in it",
        "2 batches are missing in between: they came faster than the recording was read",
    ]
    assert choose(records, parse_range("7:"), None).notes == []


LIVES: list[AnyRecord] = [
    *(header(), sent(1), ended(1), sent(2), ended(2, "m/0: rank 1 died")),
    *(sent(1, "m-0-ab"), ended(1, life="m-0-ab"), sent(1, "m-0-b")),
]


@pytest.mark.parametrize(("name", "count"), [("m-0-aa", 2), ("m-0-ab", 1), ("m-0-b", 1)])
def test_one_life_of_the_worker_is_played(name: str, count: int) -> None:
    batches = choose(LIVES, EVERYTHING, name).batches
    assert [(batch.sent.incarnation, batch.seq) for batch in batches] == [(name, seq + 1) for seq in range(count)]


@pytest.mark.parametrize(
    ("name", "found"), [(None, "3 lives"), ("m-0-a", "2 that begin with 'm-0-a'"), ("x", "0 that begin with 'x'")]
)
def test_with_several_lives_one_has_to_be_chosen(name: str | None, found: str) -> None:
    with pytest.raises(RecordingError) as raised:
        choose(LIVES, EVERYTHING, name)
    assert str(raised.value).splitlines() == [
        f"incarnation: found {found} of the worker, allowed, one of:",
        "  m-0-aa: batches 1 to 2, 1 failed, the last one with: m/0: rank 1 died",
        "  m-0-ab: batches 1 to 1",
        "  m-0-b: batches 1 to 1",
    ]


def test_a_range_of_batches_is_played() -> None:
    records: list[AnyRecord] = [header(), *map(sent, range(1, 10))]
    assert [batch.seq for batch in choose(records, parse_range("3:5"), None).batches] == [3, 4, 5]
    with pytest.raises(RecordingError, match="no batch of that range in m-0-aa, allowed: batches 1 to 9"):
        choose(records, parse_range("10:"), None)


def test_a_recording_without_batches_is_told() -> None:
    with pytest.raises(RecordingError, match="the recording of m/0 has no batch"):
        choose([header(), Gap(1)], EVERYTHING, None)
