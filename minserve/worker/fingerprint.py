"""Whether a model directory has changed: a digest of what its files look like from outside."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOST_FILES = 10_000  # a directory with more is judged by the first of them
IGNORED_FOLDERS = frozenset({"__pycache__"})
IGNORED_ENDINGS = ("~", ".swp", ".tmp", ".pyc")  # of editors that are about to replace a file, and of Python


async def read_fingerprint(directory: Path) -> str:
    """`fingerprint`, off the event loop: a disk may take its time."""
    return await asyncio.to_thread(fingerprint, directory)


def fingerprint(directory: Path) -> str:
    """A digest of path, size and time of change of each file below a directory; of an archive the same of itself.

    The directory itself may be a symbolic link; one within it counts by where it points, and is not followed: it may lead
    out, or round in a circle. Never raises: what cannot be looked at is not there.
    """
    digest = hashlib.blake2b(digest_size=16)
    if directory.is_file():
        with contextlib.suppress(OSError):
            status = directory.stat()
            digest.update(repr((status.st_ino, status.st_size, status.st_mtime_ns)).encode())
    for entry in itertools.islice(_files(directory), MOST_FILES):
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def _files(directory: Path) -> Iterator[tuple[str, int, int, str]]:
    for folder, folders, files in os.walk(directory):  # os.walk leaves out what it may not read
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = sorted(name for name in folders if name not in IGNORED_FOLDERS)
        for name in sorted(files + links):
            if name.endswith(IGNORED_ENDINGS):
                continue
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
                target = os.readlink(path) if os.path.islink(path) else ""
            except OSError:  # it has just gone
                continue
            yield os.path.relpath(path, directory), status.st_size, status.st_mtime_ns, target
