"""Streams a line for each step, made by an all-reduce over the ranks: line k is "k:<nonce + k>".

How it sends is up to the request: {"nonce": 17, "steps": 5, "pace": 0.01, "how": "yield" | "thread" | "rank0", "pad": 1000}.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from ts.handler_utils.utils import send_intermediate_predict_response  # type: ignore[import-not-found]

from minserve.handlers import BaseHandler
from tests.chaos.models import orders

Chunks = list[object]


class Streams(BaseHandler):
    def load(self, context: Any) -> None:
        orders.at_start("load")

    def handle(self, data: list[dict[str, Any]], context: Any) -> Any:
        batch = orders.rows(data)
        how = batch[0].get("how", "yield")
        if how == "yield":
            return self.chunks(batch)

        def send() -> None:
            for chunks in self.chunks(batch):
                if how == "thread" or self.rank == 0:
                    send_intermediate_predict_response(chunks, context.request_ids, "", 200, context)

        if how == "thread":
            in_thread(send)
        else:
            send()
        return [""] * len(batch)

    def chunks(self, batch: list[orders.Row]) -> Iterator[Chunks]:
        for step in range(1, max(row["steps"] for row in batch) + 1):
            orders.obey(batch, "step", step)
            time.sleep(max(row.get("pace", 0.0) for row in batch))
            pieces = [orders.piece(row["nonce"] + step, self.rank, self.world_size) for row in batch]
            sums = torch.tensor(pieces)
            dist.all_reduce(sums)
            yield [
                f"{step}:{total}{' ' * row.get('pad', 0)}\n" if step <= row["steps"] else None
                for row, total in zip(batch, sums.tolist(), strict=True)
            ]


def in_thread(work: Callable[[], None]) -> None:
    """Runs it in a thread, as generators of tokens do, and raises here what it raises there."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
