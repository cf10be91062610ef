"""One run of the suite: what every scenario needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.benchmarks.load import Clients
from tests.benchmarks.peers import starting
from tests.benchmarks.peers.torchserve import TORCHSERVE, torchserve
from tests.benchmarks.programs import ProgramError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager, ExitStack

    from tests.benchmarks.peers.environments import Environments
    from tests.benchmarks.plan import Plan
    from tests.benchmarks.servers import Up
    from tests.benchmarks.workspace import Model, Workspace

SMALL = 100  # bytes of a body where its size is not what is measured


@dataclass(frozen=True, slots=True)
class Run:
    """What every scenario gets.

    Attributes:
        notes: what was missing or has failed, for the end of the table. Of peers only: what fails of ours is an error.
    """

    plan: Plan
    workspace: Workspace
    environments: Environments
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Keeps a note, once."""
        if line not in self.notes:
            self.notes.append(line)
            self.plan.tell(line)

    def torchserve(self, stack: ExitStack, models: Sequence[Model], body: bytes = b'""') -> Up | None:
        """TorchServe until the stack ends; None, and a note, where it cannot be had."""
        return self._enter(stack, TORCHSERVE, torchserve(self.workspace, self.environments, models, body))

    def peer(self, stack: ExitStack, name: str) -> Up | None:
        """mosec, LitServe or Ray Serve until the stack ends; None, and a note, where it cannot be had."""
        return self._enter(stack, name, starting.echo_server(self.workspace, self.environments, name))

    def bare(self, stack: ExitStack) -> Up:
        """The bare aiohttp application until the stack ends."""
        return stack.enter_context(starting.bare(self.workspace))

    def _enter(self, stack: ExitStack, name: str, server: AbstractContextManager[Up]) -> Up | None:
        self.plan.tell(f"starting {name}")
        try:
            return stack.enter_context(server)
        except ProgramError as error:
            self.note(f"{name}: {error}")
            return None

    def clients(self, up: Up, model: str, clients: int, size: int = SMALL, answer: bytes | None = None) -> Clients:
        """Clients in a closed loop. Without an answer the body itself must come back."""
        body = self.workspace.body(size)
        return Clients(self.plan.generator, up, model, clients, body, body.read_bytes() if answer is None else answer)
