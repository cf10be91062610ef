"""Sums a number over the ranks: rank r contributes value * (r + 1).

    {"value": 2.5}              → {"sum": 7.5, "world_size": 2}
    {"value": 1, "nonce": 4711} → {"sum": 3.0, "world_size": 2, "nonce": 4711}
    2.5                         → {"sum": 7.5, "world_size": 2}

The nonce goes through the all-reduce too: it comes back whole only if all ranks worked on the same requests in the same
order. A request that cannot be understood gets 400 and leaves the others alone.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from minserve.handlers import BaseHandler, bad_request

VALUE_LIMIT = 1e300  # the sum over the ranks must stay finite: JSON has no infinity
NONCE_LIMIT = 2**50  # and an exact integer in a float64


class Question(NamedTuple):
    value: float
    nonce: int | None


class AllReduce(BaseHandler):
    def preprocess(self, data: list[dict[str, Any]]) -> list[Question | str]:
        return [read(row) for row in data]

    def inference(self, questions: list[Question | str]) -> list[object]:
        # A refused request keeps its row, as zeros: the tensor has the same shape on all ranks whatever was sent.
        valid = [q if isinstance(q, Question) else Question(0.0, 0) for q in questions]
        rows = [[q.value * (self.rank + 1), q.nonce or 0] for q in valid]
        sums = torch.tensor(rows, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)  # one for the whole batch
        return [self.answer(i, q, *sums[i].tolist()) for i, q in enumerate(questions)]

    def answer(self, index: int, question: Question | str, total: float, nonces: float) -> dict[str, object]:
        if isinstance(question, str):
            return bad_request(self.context, index, question)
        answer: dict[str, object] = {"sum": total, "world_size": self.world_size}
        if question.nonce is not None:
            answer["nonce"] = int(nonces) // self.world_size
        return answer


def read(row: dict[str, Any]) -> Question | str:
    """The question in a request, or what is wrong with it."""
    body = row.get("data") or row.get("body")
    if isinstance(body, (str, bytes, bytearray)):
        try:
            body = json.loads(body)
        except ValueError:
            return "the body is not JSON"
    value, nonce = (body.get("value"), body.get("nonce")) if isinstance(body, dict) else (body, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= VALUE_LIMIT:
        return "value must be a number between -1e300 and 1e300"
    if nonce is not None and (type(nonce) is not int or abs(nonce) > NONCE_LIMIT):
        return "nonce must be an integer between -2**50 and 2**50"
    return Question(float(value), nonce)
