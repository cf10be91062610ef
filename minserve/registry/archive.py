"""Archives of models, `.mar` and `.tar.gz`: unpacked into a private directory, however hostile they are.

What an archive says of itself (sizes, counts, names) is not believed: bytes are counted as they are written, and a name
must lie inside. An archive needs no links and no devices, and they are what escapes are made of, so there are none.
"""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from minserve.errors import ConfigError
from minserve.registry.manifest import MANIFEST, Manifest, read_manifest

__all__ = ["ENDINGS", "MANIFEST", "Limits", "Manifest", "extract", "is_archive", "read_manifest"]

ENDINGS = (".tar.gz", ".tgz", ".mar", ".model", ".zip")
_GZIP, _ZIPS = b"\x1f\x8b", (b"PK\x03\x04", b"PK\x05\x06")
_CHUNK = 1024 * 1024
_LARGEST_HEADER = 1024 * 1024  # bytes in a tar between the contents of two files
_SHOWN = 100  # characters of an entry's name


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one archive may hold.

    Attributes:
        size: bytes of all files, unpacked.
        entries: files and folders.
        ratio: unpacked bytes for each byte of the archive; deflate reaches 1032. Looked at from `ratio_from` bytes on,
            because a small file may well be all zeros.
    """

    size: int = 256 * 1024**3
    entries: int = 100_000
    ratio: int = 200
    ratio_from: int = 256 * 1024**2


DEFAULT_LIMITS = Limits()


def is_archive(path: Path) -> bool:
    """Whether it is a file that is called like an archive."""
    return path.name.lower().endswith(ENDINGS) and os.path.isfile(path)  # never raises, as `path.is_file()` may


def extract(archive: Path, into: Path, limits: Limits = DEFAULT_LIMITS) -> Path:
    """Unpacks an archive; what kind it is its first bytes say.

    Args:
        into: a path that is not there yet. It becomes a folder that only this user can read; nothing is left there when
            the call fails.

    Returns:
        The model directory: `into`, or the one folder in it that holds everything else.

    Raises:
        ConfigError: it is no archive, or damaged, or holds what an archive must not. Names the archive and the entry.
    """
    try:
        with archive.open("rb") as file:
            into.mkdir(0o700)
            try:
                _unpack(file, _Target(archive, into, limits, os.fstat(file.fileno()).st_size))
                return _inner(into)
            except BaseException:
                shutil.rmtree(into, ignore_errors=True)
                raise
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{archive}: cannot be extracted: {error.strerror or error}") from None
    except Exception as error:  # parsers raise all sorts of things over hostile bytes
        raise ConfigError(f"{archive}: is damaged: {error or type(error).__name__}") from None


def _unpack(file: BinaryIO, target: _Target) -> None:
    magic = file.read(4)
    file.seek(0)
    if magic in _ZIPS:
        _unpack_zip(file, target)
    elif magic.startswith(_GZIP):
        _unpack_tar(file, target)
    else:
        raise ConfigError(f"{target.archive}: is neither a zip archive nor a tar archive in gzip")


def _unpack_zip(file: BinaryIO, target: _Target) -> None:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            mode = entry.external_attr >> 16
            with target.entry(entry.filename):
                if entry.flag_bits & 0x1:
                    raise _Refused("is encrypted")
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _Refused("is a link or a device; only files and folders are allowed")
                if entry.is_dir():
                    target.make_folder(entry.filename)
                    continue
                with archive.open(entry) as content:
                    target.write(entry.filename, content, executable=bool(mode & stat.S_IXUSR))


def _unpack_tar(file: BinaryIO, target: _Target) -> None:
    # As a stream, from front to end, so that nothing is decompressed twice, nor before it has been counted.
    with _CountedGzip(fileobj=file) as stream:
        stream.limit_headers()
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            while (entry := stream.read_header(archive)) is not None:
                with target.entry(entry.name):
                    if entry.isdir():
                        target.make_folder(entry.name)
                    elif entry.isreg() and (content := archive.extractfile(entry)) is not None:
                        target.write(entry.name, content, executable=bool(entry.mode & stat.S_IXUSR))
                    else:
                        raise _Refused(
                            "is a link or a device; only files and folders are allowed (tar -h follows links)"
                        )
                archive.members.clear()  # type: ignore[attr-defined]  # it keeps every entry otherwise
        stream.read_to_end()  # the checksum comes last


class _Refused(Exception):
    """Why an entry is not unpacked."""


class _Target:
    """The folder that is filled, and what may still go into it."""

    def __init__(self, archive: Path, into: Path, limits: Limits, archive_size: int) -> None:
        self.archive = archive
        self._into = into
        self._limits = limits
        self._archive_size = archive_size
        self._written = 0
        self._entries = 0
        self._folders = {into}

    @contextmanager
    def entry(self, name: str) -> Iterator[None]:
        """While one entry is unpacked: what goes wrong is told with its name."""
        try:
            self._count_entry()
            yield
        except _Refused as error:
            raise ConfigError(f"{self.archive}: entry {_shown(name)} {error}") from None
        except OSError as error:
            if not error.strerror:  # a damaged gzip stream, not the disk
                raise ConfigError(f"{self.archive}: entry {_shown(name)} is damaged: {error}") from None
            raise ConfigError(f"{self.archive}: entry {_shown(name)} cannot be written: {error.strerror}") from None
        except Exception as error:
            why = str(error) or type(error).__name__
            raise ConfigError(f"{self.archive}: entry {_shown(name)} is damaged: {why}") from None

    def make_folder(self, name: str) -> None:
        """Makes a folder, with those above it, unless it is there."""
        self._make(self._inside(name))

    def write(self, name: str, content: IO[bytes], executable: bool) -> None:
        """Writes a file that must not be there yet."""
        path = self._inside(name)
        if path == self._into:
            raise _Refused("has no name")
        self._make(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o700 if executable else 0o600)
        except FileExistsError:
            raise _Refused("is there twice") from None
        with open(descriptor, "wb") as file:
            while chunk := content.read(_CHUNK):
                self._count_bytes(len(chunk))
                if os.fstat(descriptor).st_nlink == 0:  # the server stops, which shall not wait for the rest
                    raise _Refused("was removed while it was unpacked")
                file.write(chunk)

    def _inside(self, name: str) -> Path:
        """Where an entry goes. Nothing in `into` is a link, so the text of the path decides."""
        if name.startswith("/") or "\\" in name or "\0" in name:
            raise _Refused("has a name that is not allowed: it is absolute, or has a backslash in it")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise _Refused("leads out of the archive (..)")
        return self._into.joinpath(*parts)

    def _make(self, folder: Path) -> None:
        missing = []
        while folder not in self._folders:
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            try:
                path.mkdir(0o700)
            except FileExistsError:
                raise _Refused("is there twice, as a file and as a folder") from None
            self._folders.add(path)
            self._count_entry()

    def _count_entry(self) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            raise _Refused(f"is one too many: at most {self._limits.entries} files and folders are allowed")

    def _count_bytes(self, count: int) -> None:
        self._written += count
        if self._written > self._limits.size:
            raise _Refused(f"is too large: an archive may unpack to {self._limits.size} bytes")
        if self._written > max(self._limits.ratio_from, self._archive_size * self._limits.ratio):
            raise _Refused(
                f"is compressed more than {self._limits.ratio} times, as an archive that is to fill the disk is"
            )


class _CountedGzip(gzip.GzipFile):
    """tarfile reads a header of any size into memory. Here headers have a limit."""

    _left: int | None = None

    def read(self, size: int | None = -1) -> bytes:
        chunk = super().read(size)
        if self._left is not None:
            self._left -= len(chunk)
            if self._left < 0:
                raise tarfile.ReadError(f"a header of more than {_LARGEST_HEADER} bytes")
        return chunk

    def limit_headers(self) -> None:
        self._left = _LARGEST_HEADER

    def read_header(self, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        self.limit_headers()
        entry = archive.next()
        self._left = None
        return entry

    def read_to_end(self) -> None:
        self.limit_headers()
        while self.read(_CHUNK):
            pass


def _inner(folder: Path) -> Path:
    """Without the one folder that torch-model-archiver puts around everything in a `.tgz`."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    wrapped = len(entries) == 1 and entries[0].is_dir() and entries[0].name != MANIFEST.parts[0]
    return entries[0] if wrapped else folder


def _shown(name: str) -> str:
    return repr(name if len(name) <= _SHOWN else name[: _SHOWN - 1] + "…")
