"""Archives from an address into the model store."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import secrets
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import aiohttp
from yarl import URL

from minserve.errors import DownloadFailed, ModelNotFound, NotSaved
from minserve.registry.addresses import CheckedResolver, Forbidden, check_address, is_ip, matching_patterns, names_host
from minserve.registry.archive import ENDINGS, is_archive

LARGEST_DOWNLOAD = 64 * 1024**3  # bytes
_TIMEOUT = aiohttp.ClientTimeout(total=3600.0, sock_connect=30.0, sock_read=60.0)  # seconds
_MOST_REDIRECTS = 5
_CHUNK = 1024 * 1024
_FILE_NAME = re.compile(r"\w[\w.+\- ]{0,199}")
_PART_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.part")
_REDIRECTS = (301, 302, 303, 307, 308)

logger = logging.getLogger(__name__)


def in_store(url: str, store: Path) -> Path | None:
    """The file or folder of the store that a `file://` address stands for; None for all other addresses.

    Raises:
        ModelNotFound: it is in the store and is not there.
    """
    _check_path(url)
    path, folder = _local(url), Path(os.path.abspath(store))
    if path is None or not path.is_relative_to(folder):
        return None
    if path == folder or not (os.path.isdir(path) or is_archive(path)):
        raise ModelNotFound(f"Model not found at: {url}")
    return path


async def fetch(url: str, store: Path, allowed_urls: Sequence[str], limit: int = LARGEST_DOWNLOAD) -> Path:
    """Fetches an archive into the store, whole or not at all.

    Args:
        url: an http, https or file address.
        allowed_urls: regular expressions, one of which must match all of it.
        limit: most bytes.

    Returns:
        The new file of the store.

    Raises:
        ModelNotFound: the address, or what it stands for, is not allowed, or it is none.
        NotSaved: the store has a file of that name already, or cannot take one.
        DownloadFailed: it cannot be fetched.
        ConfigError: a pattern is wrong.
    """
    _check_path(url)
    parts = urlsplit(url)
    if parts.scheme.lower() not in ("http", "https", "file"):
        raise ModelNotFound(f"Model not found at: {url}")
    if not matching_patterns(url, allowed_urls):
        raise _not_allowed(url)
    name = unquote(parts.path).rpartition("/")[2]
    if not _FILE_NAME.fullmatch(name) or not name.lower().endswith(ENDINGS):
        raise _failed(url, f"the file name must end in {', '.join(ENDINGS)} and have no strange characters")
    target, part = store / name, store / f".{name}.{secrets.token_hex(4)}.part"  # `load_models=all` passes over a dot
    try:
        _check_free(target)
        await asyncio.to_thread(remove_abandoned, store)
        # A file object has a lock: closing it when this call is cancelled waits for the thread that writes.
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if (path := _local(url)) is not None:
                    await asyncio.to_thread(_copy, path, file, limit)
                else:
                    await _get(url, allowed_urls, file, limit)
            except Forbidden as error:
                logger.warning("%s: is not fetched: %s", url, error)
                raise _not_allowed(url) from None
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise _failed(url, str(error) or type(error).__name__) from None
            file.flush()
            _put(part, target)
    except FileExistsError:
        raise NotSaved(f"Model file already exists {name}") from None
    except OSError as error:
        logger.warning("%s: cannot be saved to %s: %s", url, target, error)
        raise NotSaved(f"Failed to save model: {url}") from None
    finally:
        part.unlink(missing_ok=True)
    logger.info("%s: fetched to %s", url, target)
    return target


def remove_abandoned(store: Path) -> None:
    """Removes what a server had fetched of an archive before it was killed: whoever still fetches has a lock on it."""
    try:
        parts = list(store.glob(".*.part"))
    except OSError:  # a store that may not be read: `locate` says so
        return
    for part in parts:
        if _PART_NAME.fullmatch(part.name) is None or not part.is_file():
            continue
        with suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
            logger.info("%s: removed, a server that was killed has left it", part)


def _check_path(url: str) -> None:
    if not url:
        raise ModelNotFound("empty url")
    if ".." in unquote(url):
        raise ModelNotFound(f"Relative path is not allowed in url: {url}")
    try:
        urlsplit(url)
    except ValueError:
        raise ModelNotFound(f"Model not found at: {url}") from None


def _local(url: str) -> Path | None:
    parts = urlsplit(url)
    if parts.scheme.lower() != "file" or parts.netloc.lower() not in ("", "localhost") or "\0" in unquote(parts.path):
        return None
    return Path(os.path.abspath(unquote(parts.path)))


def _not_allowed(url: str) -> ModelNotFound:
    return ModelNotFound(f"Given URL {url} does not match any allowed URL(s)")


def _failed(url: str, why: object) -> DownloadFailed:
    logger.warning("%s: cannot be fetched: %s", url, why)
    return DownloadFailed(f"Failed to download archive from: {url}")


def _copy(path: Path, file: BinaryIO, limit: int) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # else a pipe would be waited for
    except OSError as error:
        raise ValueError(error.strerror) from None
    with os.fdopen(descriptor, "rb") as source:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("no regular file")
        left = limit
        while chunk := source.read(_CHUNK):
            left -= len(chunk)
            _check_left(left, limit)
            file.write(chunk)


async def _get(url: str, allowed_urls: Sequence[str], file: BinaryIO, limit: int) -> None:
    async with _open_http(url, allowed_urls) as response:
        left = limit
        async for chunk in response.content.iter_chunked(_CHUNK):
            left -= len(chunk)
            _check_left(left, limit)
            await asyncio.to_thread(file.write, chunk)


def _check_left(left: int, limit: int) -> None:
    if left < 0:
        raise ValueError(f"larger than {limit} bytes")


@asynccontextmanager
async def _open_http(url: str, allowed_urls: Sequence[str]) -> AsyncIterator[aiohttp.ClientResponse]:
    """The response to a GET, after redirects within the host, each of them to an address that is allowed."""
    text, address = url, _parse(url)
    for _ in range(_MOST_REDIRECTS):
        patterns, host = matching_patterns(text, allowed_urls), address.host or ""
        if not patterns:
            raise Forbidden(f"redirected to {address}, which no pattern of allowed_urls matches")
        named = any(names_host(pattern, host) for pattern in patterns)
        if is_ip(host) and not named:  # aiohttp resolves no addresses
            check_address(host, host)
        connector = aiohttp.TCPConnector(
            resolver=CheckedResolver(host if named else None), use_dns_cache=False, force_close=True
        )
        # As it lies there: not unpacked, for which there would be no limit.
        async with (
            aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, auto_decompress=False) as session,
            session.get(address, allow_redirects=False, headers={"Accept-Encoding": "identity"}) as response,
        ):
            if response.status not in _REDIRECTS:
                if response.status != 200:
                    raise ValueError(f"HTTP status {response.status}")
                yield response
                return
            following = _parse(str(address.join(URL(response.headers.get("Location", "")))))
            if following.host != address.host or (address.scheme == "https" and following.scheme != "https"):
                raise Forbidden(f"redirected to another host, or away from https: {following}")
            text, address = str(following), following
    raise ValueError(f"more than {_MOST_REDIRECTS} redirects")


def _parse(url: str) -> URL:
    """The address as aiohttp reads it, so that what is checked is what is used."""
    address = URL(url)
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError("no http or https address")
    if address.user is not None or address.password is not None or "\\" in url:
        # `http://good.example@bad.example/` looks to many a pattern like an address of the good one.
        raise ValueError("an address with a user name or a backslash in it")
    return address


def _check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError


def _put(part: Path, target: Path) -> None:
    """Gives the file its name, and does not take it from another that has come meanwhile."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        _check_free(target)
        part.rename(target)
