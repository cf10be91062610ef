r"""Streams one line per step, each made by an all-reduce over the ranks.

    {"text": "abc", "steps": 2} → "1:12\n", then "2:15\n"

Line n is `n:sum`, where rank r contributes (n + the length of the text) * (r + 1). `steps` is 5 if left out. A request
that cannot be understood gets 400 in its first chunk and leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from minserve.handlers import BaseHandler, bad_request

MOST_STEPS = 100_000


class Prompt(NamedTuple):
    length: int
    steps: int


class Stream(BaseHandler):
    def handle(self, data: list[dict[str, Any]], context: Any) -> Iterator[list[object]]:
        """Each yield holds one chunk per request; None for a request that has nothing in this step."""
        prompts = [read(row) for row in data]
        lengths = [p.length if isinstance(p, Prompt) else 0 for p in prompts]
        # A bad request has one step: its error. All ranks see the same requests, so all take the same number of steps.
        steps = [p.steps if isinstance(p, Prompt) else 1 for p in prompts]
        for step in range(1, max(steps) + 1):
            sums = (torch.tensor(lengths, device=self.device) + step) * (self.rank + 1)
            dist.all_reduce(sums)
            chunks: list[object] = [f"{step}:{total}\n" for total in sums.tolist()]
            for index, prompt in enumerate(prompts):
                if step > steps[index]:
                    chunks[index] = None
                elif isinstance(prompt, str):
                    chunks[index] = bad_request(context, index, prompt)
            yield chunks


def read(row: dict[str, Any]) -> Prompt | str:
    """The prompt in a request, or what is wrong with it."""
    body = row.get("data") or row.get("body")
    if not isinstance(body, dict) or not isinstance(body.get("text"), str):
        return 'the body must be JSON like {"text": "abc", "steps": 5}'
    steps = body.get("steps", 5)
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        return f"steps must be an integer from 1 to {MOST_STEPS}"
    return Prompt(len(body["text"]), steps)
