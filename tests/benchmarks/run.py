"""One run of the suite: what every scenario needs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS
from tests.benchmarks.load import Clients
from tests.benchmarks.peers import starting
from tests.benchmarks.peers.torchserve import TORCHSERVE, torchserve
from tests.benchmarks.servers import minserve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
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

    @contextlib.contextmanager
    def forgive(self, name: str, what: str = "") -> Iterator[None]:
        """What fails of a peer becomes a note, and the block ends. What fails of ours is raised.

        Args:
            what: was measured, for the note.
        """
        try:
            yield
        except Exception as error:  # whatever it is: half an hour of figures must not hang on another's server
            if name == OURS:
                raise
            self.note(f"{name}{', ' if what else ''}{what}: {error}")

    def server(self, name: str, models: Sequence[Model], body: bytes = b'""') -> AbstractContextManager[Up]:
        """minserve or TorchServe with these models. Raises ProgramError where it cannot be had.

        Args:
            body: what TorchServe's models are asked until they answer.
        """
        self.plan.tell(f"starting {name}")
        if name == OURS:
            return minserve(self.workspace, models)
        return torchserve(self.workspace, self.environments, models, body)

    def servers(self, stack: ExitStack, models: Sequence[Model]) -> dict[str, Up]:
        """minserve, and TorchServe where it can be had, with the same models until the stack ends."""
        ups = {}
        for name in (OURS, TORCHSERVE):
            with self.forgive(name):
                ups[name] = stack.enter_context(self.server(name, models))
        return ups

    def bare(self, stack: ExitStack) -> Up:
        """The bare aiohttp application until the stack ends."""
        return stack.enter_context(starting.bare(self.workspace))

    def clients(self, up: Up, model: str, clients: int, size: int = SMALL, answer: bytes | None = None) -> Clients:
        """Clients in a closed loop. Without an answer the body itself must come back."""
        body = self.workspace.body(size)
        return Clients(self.plan.generator, up, model, clients, body, body.read_bytes() if answer is None else answer)
