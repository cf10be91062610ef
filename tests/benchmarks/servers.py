"""minserve as a user starts it, and what every server of a comparison is to the load."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tests.benchmarks.contest import OURS, LoadError
from tests.benchmarks.programs import Program, ProgramError, family_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.benchmarks.workspace import Model, Workspace

ANSWER_TIMEOUT_S = 60.0
LARGEST_BODY = 32 * 2**20
PORTS = ("--inference-port", "0", "--management-port", "0", "--metrics-port", "0")


@dataclass(frozen=True, slots=True)
class Up:
    """A server that answers.

    Attributes:
        name: as in the table.
        base: URL of its /predictions.
        management: URL of /models of a server that has it.
        pid: its own process, which takes the requests.
    """

    name: str
    base: str
    pid: int
    program: Program
    management: str = ""

    def url(self, model: str) -> str:
        """Where a model takes requests."""
        return f"{self.base}/predictions/{model}"

    def ranks(self, model: str) -> list[int]:
        """Pids of a model's ranks, rank 0 first, from minserve; of all that it has started from another server."""
        if self.name != OURS:
            return [process.pid for process in family_of(self.pid)]
        with urllib.request.urlopen(f"{self.management}/models/{model}", timeout=ANSWER_TIMEOUT_S) as answer:
            workers = json.load(answer)[0]["workers"]
        return [rank["pid"] for worker in workers for rank in worker["ranks"]]


@contextlib.contextmanager
def minserve(workspace: Workspace, models: Sequence[Model]) -> Iterator[Up]:
    """A server of these models, once all are READY.

    Raises:
        ProgramError: the server ended, or a model did not load.
    """
    options = workspace.path / "options.yaml"
    options.write_text(f"max_request_size: {LARGEST_BODY}\nmax_response_size: {LARGEST_BODY}\n")
    command = [sys.executable, "-m", "minserve", "start", "--config", str(options), *PORTS]
    with Program(workspace, OURS, [*command, "--model-store", str(workspace.store(models))]) as program:
        match = program.wait_for(r"not ready: .*|^inference +(?P<inference>\S+)\nmanagement +(?P<management>\S+)\n")
        if match["inference"] is None:
            raise ProgramError(f"minserve: {match[0]}\n{program.tail()}")
        yield Up(OURS, match["inference"], program.pid, program, match["management"])


def ask(url: str, body: bytes) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body of the answer.

    Raises:
        LoadError: there was none.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=ANSWER_TIMEOUT_S)
    with contextlib.closing(connection):
        try:
            connection.request("POST", parts.path, body, {"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise LoadError(f"{url} does not answer: {error!r}") from error
