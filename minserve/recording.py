"""Recordings as files: written by `minserve record` from a running server, read by `minserve replay`."""

from __future__ import annotations

import http.client
import os
import urllib.parse
from typing import TYPE_CHECKING

from minserve.client import Client, error_text
from minserve.errors import MinServeError, WireError
from minserve.wire.recording import MAGIC, Header, RecordReader, Sent, Stopped, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from minserve.wire.recording import AnyRecord

MAX_BYTES = 256 * 1024 * 1024
LEAST_BYTES = 64 * 1024
CONNECT_TIMEOUT_S = 5.0
READ_BYTES = 1024 * 1024


class RecordingError(MinServeError):
    """A recording cannot be made or read. The message is one line that says what was found and what is allowed."""


class RecordingFile:
    """A file for a recording, of which the newest part is kept: at half of `max_bytes` it becomes FILE.1 and begins anew.

    Mode 0600: it holds what clients have sent. What is there already is not overwritten.

    Attributes:
        batches: how many were written, those in parts that are gone by now among them.

    Raises:
        RecordingError: it is there, or `max_bytes` is too small.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        if max_bytes < LEAST_BYTES:
            raise RecordingError(f"max-bytes: found {max_bytes}, allowed: at least {LEAST_BYTES}")
        self._path = path
        self._half = max_bytes // 2
        self._header = b""
        self._fd = -1
        self._size = 0
        self.batches = 0
        for there in (path, before_of(path)):
            if os.path.lexists(there):
                raise RecordingError(f"{there} is there already; remove it, or choose another name")

    def write(self, record: bytes) -> None:
        """Adds a record, given with its length. The first one is the header, which each part has.

        Raises:
            RecordingError: the disk is full, or the folder is closed to us.
        """
        try:
            if not self._header:
                self._header = MAGIC + record
                self._begin()
                return
            if self._size + len(record) > self._half and self._size > len(self._header):
                os.close(self._fd)
                self._path.replace(before_of(self._path))
                self._begin()
            self._add(record)
        except OSError as error:
            raise RecordingError(f"{self._path}: {error.strerror}") from None

    def close(self) -> None:
        """Nothing more will come."""
        if self._fd >= 0:
            os.close(self._fd)

    def _begin(self) -> None:
        self._fd = -1  # what was there is closed, should the next line fail
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._size = 0
        self._add(self._header)

    def _add(self, data: bytes) -> None:
        self._size += len(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


def before_of(path: Path) -> Path:
    """Where the part before `path` is kept."""
    return path.with_name(f"{path.name}.1")


def record(
    client: Client,
    model: str,
    worker: int,
    bodies: bool,
    file: RecordingFile,
    say: Callable[[str], None],
) -> str:
    """Keeps the records of a worker of a running server until the server ends the recording; why it did.

    Args:
        client: of its management address.
        say: told once the recording has begun.

    Raises:
        RecordingError: the server refuses, or has gone; the file cannot be written.
    """
    reason = ""
    for data in _records(client, model, worker, bodies):
        file.write(data)
        record = decode(data)
        if isinstance(record, Header):
            say(f"recording {record.who}, {'with' if bodies else 'without'} bodies; Ctrl-C ends it")
        elif isinstance(record, Sent):
            file.batches += 1
        elif isinstance(record, Stopped):
            reason = record.reason
    return reason


def _records(client: Client, model: str, worker: int, bodies: bool) -> Iterator[bytes]:
    query = urllib.parse.urlencode({"worker": worker, "bodies": str(bodies).lower()})
    connection = client.connection(CONNECT_TIMEOUT_S)
    reader = RecordReader()
    try:
        connection.connect()
        link = connection.sock
        path = f"/models/{urllib.parse.quote(model, safe='')}/record?{query}"
        connection.request("GET", path, headers=client.headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise RecordingError(error_text(response.read()) or f"{response.status} {response.reason}")
        link.settimeout(None)  # the next batch may be hours away
        while data := response.read1(READ_BYTES):
            yield from reader.received(data)
    except (OSError, http.client.HTTPException) as error:
        raise RecordingError(f"{client.url}: {getattr(error, 'strerror', None) or repr(error)}") from None
    finally:
        connection.close()


def read_recording(path: Path) -> tuple[list[AnyRecord], list[str]]:
    """All records of a recording, and of the part before it where there is one; and warnings about what is missing.

    Raises:
        RecordingError: it is none, or cannot be read.
    """
    records: list[AnyRecord] = []
    warnings: list[str] = []
    before = before_of(path)
    parts = [part for part in (before, path) if part.exists()]
    for part in parts or [path]:
        found, midway = _read(part)
        if midway:
            warnings.append(f"{part} ends in the middle of a record, which is left out")
        if records and found and records[0] != found[0]:
            raise RecordingError(f"{before} and {path} are parts of different recordings; move one of them away")
        records += found[1:] if records else found
    if not records:
        raise RecordingError(f"{path}: the recording is empty")
    return records, warnings


def _read(path: Path) -> tuple[list[AnyRecord], bool]:
    reader = RecordReader()
    records: list[AnyRecord] = []
    try:
        with path.open("rb") as file:
            while data := file.read(READ_BYTES):
                records += [decode(record) for record in reader.received(data)]
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror}") from None
    except WireError as error:
        raise RecordingError(f"{path}: {error}") from None
    if records and not isinstance(records[0], Header):
        raise RecordingError(f"{path}: found a {type(records[0]).__name__} at the start, allowed: a Header")
    return records, reader.midway
