import contextlib
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.client import Client
from minserve.recording import LEAST_BYTES, RecordingError, RecordingFile, before_of, read_recording, record
from minserve.wire.messages import Part, RequestMeta
from minserve.wire.recording import MAGIC, AnyRecord, Ended, Header, Sent, Stopped, encode

HEADER = Header("0.1.0", "m", "1.0", "m/0", 2, 4, bodies=True, began=17.0)


def sent(seq: int, size: int = 0) -> Sent:
    return Sent("m-0-a", seq, 18.0, (RequestMeta("id", (), (Part("body", "", size),)),), (b"x" * size,))


def write(path: Path, records: list[AnyRecord], max_bytes: int = 2**20) -> None:
    file = RecordingFile(path, max_bytes)
    for one in records:
        file.write(encode(one))
    file.close()


def seqs(records: list[AnyRecord]) -> list[int]:
    return [one.seq for one in records if isinstance(one, Sent)]


# ── files ──


def test_what_was_written_is_read_and_nobody_else_may(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    records: list[AnyRecord] = [HEADER, sent(1, 10), Ended("m-0-a", 1, 19.0), Stopped("over")]
    write(path, records)
    assert read_recording(path) == (records, [])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_is_written_before_the_first_record(tmp_path: Path) -> None:
    RecordingFile(tmp_path / "recording").close()
    assert list(tmp_path.iterdir()) == []


def test_the_newest_batches_are_kept_within_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    write(path, [HEADER, *(sent(seq, 1000) for seq in range(1, 501))], LEAST_BYTES)
    sizes = [part.stat().st_size for part in (path, before_of(path))]
    assert max(sizes) <= LEAST_BYTES // 2
    assert sizes[1] > LEAST_BYTES // 2 - 1100
    records, warnings = read_recording(path)
    assert warnings == []
    assert records[0] == HEADER
    found = seqs(records)
    assert found == list(range(found[0], 501))
    assert len(found) > 30
    assert sorted(tmp_path.iterdir()) == [path, before_of(path)]
    assert {stat.S_IMODE(part.stat().st_mode) for part in tmp_path.iterdir()} == {0o600}


def test_a_batch_over_half_the_bound_is_kept_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    write(path, [HEADER, sent(1, LEAST_BYTES), sent(2, LEAST_BYTES), sent(3, LEAST_BYTES)], LEAST_BYTES)
    assert seqs(read_recording(path)[0]) == [2, 3]


@pytest.mark.parametrize("there", ["recording", "recording.1"])
def test_a_recording_that_is_there_is_not_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("precious")
    with pytest.raises(RecordingError, match=rf"/{there} is there already; remove it"):
        RecordingFile(tmp_path / "recording")
    assert (tmp_path / there).read_text() == "precious"


def test_a_bound_too_small_for_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="max-bytes: found 10, allowed: at least 65536"):
        RecordingFile(tmp_path / "recording", 10)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    file = RecordingFile(tmp_path / "none" / "recording")
    with pytest.raises(RecordingError, match="none/recording: No such file or directory"):
        file.write(encode(HEADER))
    file.close()


@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_a_recording_that_was_cut_short_is_read_with_a_warning(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "recording"
    write(path, [HEADER, sent(1, 10), sent(2, 2000)])
    path.write_bytes(path.read_bytes()[:-cut])
    records, warnings = read_recording(path)
    assert seqs(records) == [1]
    assert warnings == [f"{path} ends in the middle of a record, which is left out"]


def test_a_recorder_killed_between_two_parts_leaves_the_first(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    write(path, [HEADER, sent(1)])
    path.rename(before_of(path))
    assert seqs(read_recording(path)[0]) == [1]
    path.touch()
    records, warnings = read_recording(path)
    assert seqs(records) == [1]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# a text\n", "recording: not a recording of minserve: it starts with b'# a text"),
        (b"", "recording: the recording is empty"),
        (MAGIC, "recording: the recording is empty"),
        (MAGIC + encode(sent(1)), "recording: found a Sent at the start, allowed: a Header"),
        (MAGIC + encode(HEADER) + b"\x01\0\0\0\xc1", "recording: not a record"),
    ],
)
def test_a_file_that_is_no_recording_is_told_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "recording").write_bytes(content)
    with pytest.raises(RecordingError) as raised:
        read_recording(tmp_path / "recording")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="recording: No such file"):
        read_recording(tmp_path / "recording")


def test_parts_of_two_recordings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    write(path, [HEADER, sent(1)])
    path.rename(before_of(path))
    path.write_bytes(MAGIC + encode(Header("0.1.0", "m", "1.0", "m/0", 2, 4, True, 99.0)) + encode(sent(1)))
    with pytest.raises(RecordingError, match="parts of different recordings"):
        read_recording(path)


# ── from a server ──


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that sends one answer, whatever it is asked, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join()


def chunked(*pieces: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


RECORDED = [MAGIC + encode(HEADER), encode(sent(1, 5)) + encode(sent(2)), encode(Ended("m-0-a", 1, 19.0))]


def test_a_recording_is_kept_until_the_server_ends_it(tmp_path: Path) -> None:
    file = RecordingFile(tmp_path / "recording")
    said: list[str] = []
    with answering(chunked(*RECORDED, encode(Stopped("m/0 was stopped"))) + b"0\r\n\r\n") as url:
        reason = record(Client(url), "m", 0, True, file, said.append)
    file.close()
    assert reason == "m/0 was stopped"
    assert said == ["recording m/0, with bodies; Ctrl-C ends it"]
    assert file.batches == 2
    assert read_recording(tmp_path / "recording")[0][1:3] == [sent(1, 5), sent(2)]


def test_a_server_that_dies_is_told_and_what_came_is_kept(tmp_path: Path) -> None:
    file = RecordingFile(tmp_path / "recording")
    with answering(chunked(*RECORDED)) as url, pytest.raises(RecordingError, match=f"{url}: IncompleteRead"):
        record(Client(url), "m", 0, True, file, lambda _: None)
    file.close()
    assert seqs(read_recording(tmp_path / "recording")[0]) == [1, 2]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'HTTP/1.1 404 Not Found\r\nContent-Length: 24\r\n\r\n{"message": "no such m"}', "no such m"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops", "502 Bad Gateway"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\noops", "not a recording of minserve"),
    ],
)
def test_a_server_that_refuses_is_told_and_no_file_is_left(tmp_path: Path, answer: bytes, message: str) -> None:
    file = RecordingFile(tmp_path / "recording")
    with answering(answer) as url, pytest.raises(Exception, match=message):
        record(Client(url), "m", 0, False, file, lambda _: None)
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(RecordingError, match=f"{url}: Connection refused"):
        record(Client(url), "m", 0, False, RecordingFile(tmp_path / "recording"), lambda _: None)
