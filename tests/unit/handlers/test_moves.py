from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.distributed as dist

from minserve.handlers.moves import Moves
from minserve.rank.order import Move


def test_a_move_goes_through_the_memory_of_the_cpu_whatever_the_default_device_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line: list[list[int]] = []

    def isend(message: torch.Tensor, rank: int, group: object) -> dist.Work:
        line.append(message.tolist())
        return cast("dist.Work", object())

    def recv(message: torch.Tensor, rank: int, group: object) -> None:
        message.copy_(torch.tensor(line.pop(0), device="cpu"))

    monkeypatch.setattr(dist, "new_group", lambda *ranks, **options: object())
    monkeypatch.setattr(dist, "isend", isend)
    monkeypatch.setattr(dist, "recv", recv)
    moves = Moves([0, 1])
    with torch.device("meta"):
        moves.tell(Move(3, True))
        assert moves.hear() == Move(3, True)
