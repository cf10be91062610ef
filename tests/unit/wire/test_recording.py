import pytest

from minserve.errors import WireError
from minserve.wire.messages import Part, RequestMeta
from minserve.wire.recording import (
    MAGIC,
    MAX_RECORD_BYTES,
    AnyRecord,
    Ended,
    Gap,
    Header,
    RecordReader,
    Sent,
    Stopped,
    decode,
    encode,
)

META = RequestMeta("id", ((b"Authorization", b"Bearer \xff"),), (Part("body", "text/plain", 3), Part("x", "", 0)), "v")
RECORDS: list[AnyRecord] = [
    Header("0.1.0", "m", "1.0", "m/0", 2, 4, True, 17.5),
    Sent("m-0-ab", 1, 18.5, (META, META), (b"abc", b"", b"\0\xff.", b"")),
    Sent("m-0-ab", 2, 18.75, (META,), None),
    Ended("m-0-ab", 1, 19.0),
    Ended("m-0-ab", 2, 19.0, "m/0: rank 1 (pid 4711) was killed by SIGKILL"),
    Gap(12),
    Stopped("m/0 was stopped"),
]
WHOLE = MAGIC + b"".join(map(encode, RECORDS))


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_comes_back_as_it_was(record: AnyRecord) -> None:
    assert decode(encode(record)) == record


@pytest.mark.parametrize("size", [1, 2, 3, 7, 24, len(WHOLE)])
def test_records_are_cut_wherever_the_bytes_are(size: int) -> None:
    reader = RecordReader()
    found = [
        decode(record)
        for start in range(0, len(WHOLE), size)
        for record in reader.received(WHOLE[start : start + size])
    ]
    assert found == RECORDS
    assert not reader.midway


def test_a_recording_may_end_at_every_byte() -> None:
    ends = {len(MAGIC) + sum(len(encode(record)) for record in RECORDS[:number]) for number in range(len(RECORDS) + 1)}
    for stop in range(len(WHOLE)):
        reader = RecordReader()
        found = [decode(record) for record in reader.received(WHOLE[:stop])]
        assert found == RECORDS[: len(found)]
        assert reader.midway == (stop not in ends)


@pytest.mark.parametrize("start", [b"x", b"minserve recording 2\n", b"PK\x03\x04", b"\0" * 100])
def test_what_begins_otherwise_is_no_recording(start: bytes) -> None:
    with pytest.raises(WireError, match="not a recording of minserve: it starts with b'"):
        list(RecordReader().received(start))


@pytest.mark.parametrize("damage", [b"\xc1", b"", b"\x91\xa7Unknown", b"\x90", encode(RECORDS[0])[4:-1]])
def test_a_damaged_record_is_told(damage: bytes) -> None:
    with pytest.raises(WireError, match="not a record"):
        decode(len(damage).to_bytes(4, "little") + damage)


def test_a_length_beyond_any_batch_is_damage() -> None:
    with pytest.raises(WireError, match=f"a record of {MAX_RECORD_BYTES + 1} bytes"):
        list(RecordReader().received(MAGIC + (MAX_RECORD_BYTES + 1).to_bytes(4, "little")))
