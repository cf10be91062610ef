"""Asks, and checks every answer: the nonce must come back whole, an error must be one that a fault has brought about."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.chaos.catalogue import Model
from tests.chaos.ledger import BETWEEN, Ledger, Row, Window
from tests.chaos.server import ChaosServer

Json = dict[str, object]

DEADLINE_S = 60.0  # of ordinary requests: far above the longest restart, so that none may run into it
EARLY_S = 0.02  # the server counts in milliseconds, and from when it has read the head
GONE = 0  # stands for the status of a request whose connection broke
NONCES = 2**40


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a request. Times are on CLOCK_MONOTONIC.

    Attributes:
        status: of HTTP; GONE when the connection broke, also in the middle of a stream.
        message: of an error.
        first: when the first byte of a stream came, else when all was there.
        come_again: whether the answer has a Retry-After.
    """

    status: int
    message: str
    sent: float
    first: float
    got: float
    come_again: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """How much of a stream has come, and whether that was all of it."""

    lines: int
    whole: bool


class Client:
    """Sends requests and books what comes of them.

    Attributes:
        slack_s: by how much an answer may come behind its deadline.
    """

    def __init__(self, server: ChaosServer, ledger: Ledger, rng: random.Random, slack_s: float) -> None:
        self._server = server
        self._ledger = ledger
        self._rng = rng
        self.slack_s = slack_s
        self._session: aiohttp.ClientSession | None = None
        self._narrow: aiohttp.ClientSession | None = None
        self.in_flight: dict[str, int] = {}

    async def __aenter__(self) -> Client:
        self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.hang_up()

    def _open(self) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        narrow = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_narrow_socket)
        self._narrow = aiohttp.ClientSession(connector=narrow)

    async def hang_up(self) -> None:
        """Closes every connection, also those that are kept for the next request."""
        assert self._session is not None
        assert self._narrow is not None
        await self._session.close()
        await self._narrow.close()

    async def call_again(self) -> None:
        """With fresh connections: those that idle must not be counted as the server's."""
        await self.hang_up()
        self._open()

    # ── predictions ──

    async def ask(
        self,
        model: Model,
        fields: Mapping[str, object] | None = None,
        deadline_s: float = DEADLINE_S,
        row: Row | None = None,
    ) -> Result:
        """One request with a nonce of its own; `fields` are further fields of its body."""
        nonce = self._rng.randrange(NONCES)
        body: Json = {"nonce": nonce, **(fields or {})}
        if model.streams:
            body.setdefault("steps", self._rng.randrange(2, 12))
        before = self._ledger.windows(model.name)
        self.in_flight[model.name] = self.in_flight.get(model.name, 0) + 1
        sent = time.monotonic()
        try:
            # A stream's deadline is for its first chunk; one that shares a batch with longer ones ends with them.
            async with asyncio.timeout((DEADLINE_S if model.streams else deadline_s) + self.slack_s + 10):
                result, wrong = await self._post(model, body, deadline_s, sent)
        except TimeoutError:
            now = time.monotonic()
            result, wrong = Result(GONE, "no answer at all", sent, now, now), ""
        except asyncio.CancelledError:
            self._book_left(model, before, row)
            raise
        finally:
            self.in_flight[model.name] -= 1
        self._book(model, before, row, result, wrong, deadline_s)
        return result

    async def _post(self, model: Model, body: Json, deadline_s: float, sent: float) -> tuple[Result, str]:
        """The result, and what is wrong with a good answer."""
        assert self._session is not None
        url = f"{self._server.inference}/predictions/{model.name}"
        headers = {"x-request-timeout-ms": str(int(deadline_s * 1000))}
        status, first, lines = GONE, 0.0, []
        try:
            async with self._session.post(url, json=body, headers=headers) as answer:
                status = answer.status
                async for line in answer.content:
                    first = first or time.monotonic()
                    lines.append(line)
        except (aiohttp.ClientError, ConnectionError) as error:
            now = time.monotonic()
            text = f"{type(error).__name__}: {error}"
            wrong = _wrong_lines(body, lines, whole=False) if model.streams and status == 200 else ""
            return Result(GONE, text, sent, first or now, now), wrong
        now = time.monotonic()
        whole = b"".join(lines)
        if status != 200:
            come_again = "Retry-After" in answer.headers
            return Result(status, _message(whole), sent, first or now, now, come_again=come_again), ""
        wrong = _wrong_lines(body, lines, whole=True) if model.streams else _wrong_answer(model, body, whole)
        return Result(status, "", sent, first or now, now), wrong

    async def read(
        self, model: Model, fields: Mapping[str, object], pause_s: float, most: int = 1_000_000, row: Row | None = None
    ) -> Read:
        """Reads a stream some 64 kB at a time, with a pause before each, and leaves after so many reads."""
        assert self._narrow is not None
        body: Json = {"nonce": self._rng.randrange(NONCES), **fields}
        before, read, whole = self._ledger.windows(model.name), b"", False
        url = f"{self._server.inference}/predictions/{model.name}"
        try:
            async with self._narrow.post(url, json=body, read_bufsize=2**15) as answer:
                for _ in range(most):
                    await asyncio.sleep(pause_s)
                    piece = await answer.content.readany()
                    read += piece
                    if answer.content.at_eof():
                        whole = True
                        break
                else:
                    answer.close()
        except (aiohttp.ClientError, ConnectionError):
            pass
        lines = read.splitlines(keepends=True)
        wrong = _wrong_lines(body, lines, whole=whole)
        if wrong:
            self._row(model, before, row).wrong += 1
            self._ledger.breach("wrong answer", model.name, wrong)
        self._book_left(model, before, row)
        return Read(len(lines), whole)

    # ── the book ──

    def _book(
        self, model: Model, before: tuple[Window, ...], row: Row | None, result: Result, wrong: str, deadline_s: float
    ) -> None:
        windows = before + self._ledger.windows(model.name)
        entry = self._row(model, before, row)
        entry.asked += 1
        took = result.got - result.sent
        allowed = [window for window in windows if window.allows(result.status, result.message)]
        broken = result.status == GONE and model.streams and any(window.may_break_streams for window in windows)
        if wrong:
            entry.wrong += 1
            self._ledger.breach(f"wrong answer; {entry.name}", model.name, wrong)
        elif result.status == 200:
            entry.right += 1
        elif allowed or broken or self._expired(result, deadline_s):
            entry.refused += 1
            if not result.come_again and any(window.come_again for window in allowed):
                text = f"{result.status} without Retry-After: {result.message[:400]!r}"
                self._ledger.breach(f"when to try again; {entry.name}", model.name, text)
        else:
            entry.undue += result.status != GONE
            due = [f"{sorted(window.statuses)} /{window.says.pattern}/" for window in windows]
            text = f"{result.status} after {took:.2f} s: {result.message[:400]!r}; due was {due or 'no error'}"
            self._ledger.breach(f"error not due; {entry.name}", model.name, text)
        end = result.first if model.streams else result.got
        if end - result.sent > deadline_s + self.slack_s:
            text = f"answered {end - result.sent:.2f} s after it was sent, its deadline was {deadline_s:g} s"
            self._ledger.breach(f"late; {entry.name}", model.name, text)

    def _expired(self, result: Result, deadline_s: float) -> bool:
        """Whether a request with a short deadline was told so, and not before its time."""
        return (
            deadline_s < DEADLINE_S
            and result.status == 504
            and "within the request's deadline" in result.message
            and result.got - result.sent >= deadline_s - EARLY_S
        )

    def _book_left(self, model: Model, before: tuple[Window, ...], row: Row | None) -> None:
        entry = self._row(model, before, row)
        entry.asked += 1
        entry.left += 1

    def _row(self, model: Model, before: tuple[Window, ...], row: Row | None) -> Row:
        """The fault that a request belongs to: the one that was under way when it ended, or when it began."""
        windows = self._ledger.windows(model.name) or before
        return row or (windows[-1].row if windows else self._ledger.row(BETWEEN))

    # ── management ──

    async def describe(self, model: Model) -> Json:
        """/models/{model}."""
        (description,) = await self._get(f"/models/{model.name}")
        return description

    async def events(self, model: Model) -> list[Json]:
        """/models/{model}/events; empty when there is no such thing."""
        return await self._get(f"/models/{model.name}/events")

    async def reload(self, model: Model) -> tuple[int, str]:
        """POST /models/{model}/reload: status and text."""
        assert self._session is not None
        async with self._session.post(f"{self._server.management}/models/{model.name}/reload") as answer:
            return answer.status, await answer.text()

    async def ready(self) -> tuple[int, str]:
        """/readyz: status and text."""
        assert self._session is not None
        async with self._session.get(f"{self._server.inference}/readyz") as answer:
            return answer.status, await answer.text()

    async def _get(self, path: str) -> list[Json]:
        """A list of objects, also when it lies in an object as its only list; nothing when the route is not there."""
        assert self._session is not None
        async with self._session.get(f"{self._server.management}{path}") as answer:
            found = await answer.json(content_type=None)
        if isinstance(found, dict):
            found = next((value for value in found.values() if isinstance(value, list)), [])
        assert isinstance(found, list)
        return found


def _narrow_socket(address: tuple[Any, ...]) -> socket.socket:
    """One with a small receive buffer: else the kernel takes megabytes for a client that reads none of them."""
    family, kind, protocol = address[:3]
    narrow = socket.socket(family, kind, protocol)
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    narrow.setblocking(False)
    return narrow


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


def _wrong_answer(model: Model, body: Json, answer: bytes) -> str:
    nonce = body["nonce"]
    assert isinstance(nonce, int)
    check = nonce ^ 0xABC
    if model.handler == "pp":
        check = nonce
        for stage in range(model.ranks):
            check = check * 3 + stage + 1
    expected = {"nonce": nonce, "check": check, "world": model.ranks}
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    return "" if found == expected else f"expected {expected}, got {answer[:300]!r}"


def _wrong_lines(body: Json, lines: list[bytes], *, whole: bool) -> str:
    nonce, steps = body["nonce"], body["steps"]
    assert isinstance(nonce, int)
    assert isinstance(steps, int)
    expected = [f"{step}:{nonce + step}" for step in range(1, steps + 1)]
    if not whole:  # the last line may have been cut
        lines = [line for line in lines if line.endswith(b"\n")]
    found = [line.decode(errors="replace").strip() for line in lines]
    if found != (expected if whole else expected[: len(found)]):
        return f"expected {expected[:20]}, got {found[:20]}{'' if whole else ' of a broken stream'}"
    return ""
