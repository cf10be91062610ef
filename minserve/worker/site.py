"""The files and sockets of one incarnation of a worker: its directory, endpoints, board, and its ranks' log pipes."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from minserve.wire.board import Board
from minserve.worker import endpoints as addressing
from minserve.worker.agent_report import REPORT_LINES, before_report, first_failure
from minserve.worker.blame import AGENT
from minserve.worker.memory import Memory
from minserve.worker.output import TAIL_LINES, Output, open_fifo

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable
    from pathlib import Path

    from minserve.wire.arena import Arena
    from minserve.worker.agent_report import FirstFailure
    from minserve.worker.endpoints import Endpoints
    from minserve.worker.spec import ModelSpec


class Site:
    """Where one incarnation lives. `close` may be called at any time, and leaves nothing behind.

    Args:
        who: "model/worker number" for the log.
        slot: number of the worker within its model version; fixes its endpoints.
        directory: the model version's runtime directory.
        arena: for the model version's large bodies.

    Attributes:
        path: the incarnation's own directory.
        listeners: in rank order, until the ranks have come.
        outputs: by rank, AGENT for torchrun.
        board: None before `open` and after `close`.
        memory: shared with the ranks; None before `open`, and where all bodies go over the sockets.
    """

    def __init__(self, spec: ModelSpec, who: str, slot: int, directory: Path, arena: Arena | None = None) -> None:
        self._spec = spec
        self._who = who
        self._slot = slot
        self._directory = directory
        self.path = directory / f"{slot}.r"
        self.endpoints: Endpoints | None = None
        self.listeners: list[socket.socket] = []
        self.outputs: dict[int, Output] = {}
        self.board: Board | None = None
        self.memory: Memory | None = None
        self._arena = arena

    def open(self) -> Endpoints:
        """Makes everything, the endpoints bound.

        Raises:
            WorkerFailed: no ports.
        """
        options, ranks = self._spec.config.minserve, self._spec.world_size
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(mode=0o700)
        if options.socket_type == "unix":
            self.endpoints = addressing.unix_endpoints(self._directory, self._slot, ranks)
            self.listeners = addressing.listen_unix(self.endpoints)
        else:
            self.endpoints, self.listeners = addressing.listen_tcp(ranks, options.port or addressing.FIRST_PORT)
        self.board = Board(self.path / "board", ranks)
        if self._arena is not None and options.socket_type == "unix":  # others carry no descriptors
            self.memory = Memory(self._arena, ranks)
        for rank in range(ranks):
            fifo = open_fifo(self.path / f"output.{rank}")
            self.outputs[rank] = Output(fifo, f"{self._who} rank {rank}")
        return self.endpoints

    def read_agent(self, pipe: int) -> None:
        """From now on torchrun's output is read, too. Takes over the pipe."""
        self.outputs[AGENT] = Output(pipe, f"{self._who} torchrun", TAIL_LINES + REPORT_LINES)

    def last_lines(self, ranks: Iterable[int]) -> tuple[str, ...]:
        """The last lines that these have printed. AGENT's are those before its report of a failure."""
        tails = [(rank, self._tail(rank)) for rank in ranks if rank in self.outputs]
        return tuple(
            line for rank, tail in tails for line in (before_report(tail)[-TAIL_LINES:] if rank == AGENT else tail)
        )

    def first_failure(self) -> FirstFailure | None:
        """The rank that ended first, as torchrun, which has ended itself, reports it."""
        return first_failure(self._tail(AGENT))

    def _tail(self, rank: int) -> list[str]:
        output = self.outputs[rank]
        output.catch_up()  # a death may be seen before the last words
        return list(output.tail)

    def close(self) -> None:
        """Closes and removes everything. What the ranks have printed last is still read."""
        addressing.close_all(self.listeners)
        for output in self.outputs.values():
            output.close()
        if self.board is not None:
            self.board.close()
            self.board = None
        if self.memory is not None:
            self.memory.close()
        shutil.rmtree(self.path, ignore_errors=True)
