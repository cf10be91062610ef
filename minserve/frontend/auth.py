"""Token authorization as TorchServe has it (torchserve.md 12.3): three keys, in a file that only the server's user can read.

The key of inference and the key of management expire. The API key does not; it stands for one thing alone, a new one of the
others. What a request needs is decided where its route is added, see `frontend.routing`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from aiohttp import hdrs, web

from minserve.errors import InvalidKey, MinServeError, StartupError
from minserve.frontend.errors import JSON
from minserve.frontend.passage import Carried
from minserve.frontend.routing import ANY_METHOD, add_route

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from minserve.frontend.routing import Check, Routes

logger = logging.getLogger(__name__)

KEY_FILE = "key_file.json"  # in the server's current folder, where TorchServe's scripts look for it
KEY_BYTES = 18  # 24 characters, 144 bits; TorchServe's have 48
LATEST = 253_402_300_799.0  # the end of the year 9999, the last that a date can have
_BEARER = re.compile(r"Bearer\s+(\S+)")


class Kind(StrEnum):
    """What a key is for, as the key file says it."""

    MANAGEMENT = "management"
    INFERENCE = "inference"
    API = "API"


@dataclass(frozen=True, slots=True)
class _Key:
    text: str
    expires: float | None  # seconds since the epoch; None: never


class Keys:
    """The keys of one life of the server, and the file that tells them.

    Args:
        path: of the key file. One that is there is from an earlier life, and is replaced.
        minutes: after which the keys of inference and management expire; fractions count.
        now: seconds since the epoch.

    Raises:
        StartupError: the file cannot be written.
    """

    def __init__(self, path: Path, minutes: float, now: Callable[[], float] = time.time) -> None:
        self.path = path
        self._minutes = minutes
        self._now = now
        self._keys = {kind: self._fresh(kind) for kind in Kind}
        try:
            self._write(self._keys)
        except OSError as error:
            raise StartupError(
                f"{path}: the keys cannot be written: {error.strerror}; disable_token_authorization serves without keys"
            ) from None
        logger.info("requests need a key: %s has them", path)

    def require(self, kind: Kind) -> Check:
        """A check that lets only those requests pass whose `Authorization: Bearer KEY` has the key of a kind.

        A request that was carried had it when it came.
        """

        def check(request: web.Request) -> None:
            if not isinstance(request.content, Carried):
                self.check(kind, request.headers.get(hdrs.AUTHORIZATION, ""))

        return check

    def check(self, kind: Kind, header: str) -> None:
        """Lets a header `Authorization` pass, "" for none.

        Raises:
            InvalidKey: it has not the key of that kind.
        """
        if not self.good(kind, {hdrs.AUTHORIZATION: header}):
            what = "Authentication" if kind is Kind.API else "Authorization"
            raise InvalidKey(f"Token {what} failed. Token either incorrect, expired, or not provided correctly")

    def renew(self, kind: Kind) -> None:
        """Puts a new key in the place of one. The old one is good until the file has the new one.

        Raises:
            MinServeError: the file cannot be written; the old key stays.
        """
        keys = {**self._keys, kind: self._fresh(kind)}
        try:
            self._write(keys)
        except OSError as error:
            raise MinServeError(f"{self.path.name} cannot be written: {error.strerror}; the old key stays") from None
        self._keys = keys
        logger.info("a new %s key is in %s", kind, self.path)

    def remove(self) -> None:
        """Removes the file, unless another server has put its own in its place."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            there = json.loads(self.path.read_bytes())[Kind.API]["key"]
            if there == self._keys[Kind.API].text:
                self.path.unlink()

    def good(self, kind: Kind, headers: Mapping[str, str]) -> bool:
        """Whether these headers have the key of a kind."""
        match = _BEARER.fullmatch(headers.get(hdrs.AUTHORIZATION, ""))
        key = self._keys[kind]
        # All of it is looked at whatever is wrong: how long it takes tells nothing about the key.
        same = secrets.compare_digest(
            match[1].encode("utf-8", "surrogateescape") if match is not None else b"", key.text.encode()
        )
        return same and (key.expires is None or self._now() < key.expires)

    def _fresh(self, kind: Kind) -> _Key:
        expires = None if kind is Kind.API else min(self._now() + 60 * self._minutes, LATEST)
        return _Key(secrets.token_urlsafe(KEY_BYTES), expires)

    def _write(self, keys: Mapping[Kind, _Key]) -> None:
        """Puts the file in its place as a whole: whoever reads it, the server's user alone, sees the old keys or the new."""
        text = json.dumps({kind: _told(key) for kind, key in keys.items()}, indent=2)
        fresh = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "w") as file:
                file.write(text)
            fresh.replace(self.path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise


def _told(key: _Key) -> dict[str, str]:
    if key.expires is None:
        return {"key": key.text}
    expires = datetime.fromtimestamp(key.expires, UTC).replace(tzinfo=None)
    return {"key": key.text, "expiration time": f"{expires.isoformat(timespec='microseconds')}Z"}


class TokenRoute:
    """The route /token of the management address."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def add_routes(self, routes: Routes) -> None:
        """TorchServe takes any method, and any path that has `/token` somewhere in it."""
        add_route(routes.behind(self._keys.require(Kind.API)), ANY_METHOD, "/token", self.renew)

    async def renew(self, request: web.Request) -> web.Response:
        """Puts a new key in the place of the management or the inference key. The key file then has it, the answer has not.

        Needs the API key.
        """
        wanted = request.query.get("type")
        if wanted not in (Kind.MANAGEMENT, Kind.INFERENCE):
            raise InvalidKey(
                "Token Authentication failed. Token either incorrect, expired, or not provided correctly "
                "(type: allowed are management and inference)"
            )
        self._keys.renew(Kind(wanted))
        return web.Response(body=b"\n", content_type=JSON)  # as with TorchServe, whose scripts then read the file
