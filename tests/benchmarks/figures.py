"""What is read of a load: a figure, at so many clients, of a model with such a batchSize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.benchmarks.contest import pick

if TYPE_CHECKING:
    from tests.benchmarks.contest import Loads


@dataclass(frozen=True, slots=True)
class Figure:
    """Attributes of `Load` by the name that the table has for them."""

    what: str
    unit: str
    attribute: str
    clients: int
    batch_size: int

    def of(self, loads: Loads, key: str) -> list[float]:
        """One value a round; empty for a contestant that is not there."""
        return pick(loads, key, self.attribute)

    def __str__(self) -> str:
        return f"{self.what}, {self.clients} client{'s' * (self.clients > 1)}, batchSize {self.batch_size}"


def p50(clients: int, batch_size: int) -> Figure:
    """Half of the requests took no longer."""
    return Figure("p50", "µs", "p50_us", clients, batch_size)


def p99(clients: int, batch_size: int) -> Figure:
    """All but one in a hundred took no longer."""
    return Figure("p99", "µs", "p99_us", clients, batch_size)


def rate(clients: int, batch_size: int) -> Figure:
    """Answers a second."""
    return Figure("requests/s", "", "requests_per_s", clients, batch_size)


def server_cpu(clients: int, batch_size: int) -> Figure:
    """CPU of the server's own process for a request."""
    return Figure("server's CPU a request", "µs", "server_cpu_us", clients, batch_size)


def ranks_cpu(clients: int, batch_size: int) -> Figure:
    """CPU of all ranks together for a request."""
    return Figure("ranks' CPU a request", "µs", "ranks_cpu_us", clients, batch_size)
