"""Every rank gets every request exactly once, and all ranks in the same order."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from tests.integration.servers import MODELS, server

REQUESTS = 2000


async def send_all(url: str, clients: int) -> None:
    """Sends the nonces from a number of clients at once; each must get its own back."""
    nonces = iter(range(REQUESTS))

    async def client(session: aiohttp.ClientSession) -> None:
        for nonce in nonces:
            async with session.post(url, data=f"{clients}-{nonce}", headers={"Content-Type": "text/plain"}) as answer:
                assert (answer.status, await answer.text()) == (200, f"{clients}-{nonce}")

    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client(session))


@pytest.mark.asyncio
async def test_every_rank_sees_every_request_once_and_in_the_same_order(tmp_path: Path) -> None:
    with server(MODELS / "nonces", environ={"NONCES": str(tmp_path)}) as running:
        for clients in (1, 8, 64):
            await send_all(f"{running.inference}/predictions/nonces", clients)
    seen = [(tmp_path / str(rank)).read_text().split() for rank in (0, 1)]
    assert seen[0] == seen[1]
    assert sorted(seen[0]) == sorted(f"{clients}-{nonce}" for clients in (1, 8, 64) for nonce in range(REQUESTS))
