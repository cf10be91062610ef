"""What a prediction needs of the models: those of this process, or the same from another one (`minserve.frontends`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from minserve.dispatch.request import Reply, Request
    from minserve.wire.arena import Arena


class Spec(Protocol):
    """What a model version is."""

    @property
    def name(self) -> str:
        """Its model's name."""

    @property
    def request_timeout(self) -> float:
        """Seconds that a request has, if its client asks for no less."""


class Seconds(Protocol):
    """Times that are measured."""

    def record(self, value: float) -> None:
        """Observes one."""


class Meters(Protocol):
    """What is measured of a model version."""

    @property
    def frontend(self) -> Seconds:
        """Seconds spent on reading a request and on making its answer."""


class Dispatching(Protocol):
    """A model version's queue."""

    @property
    def meters(self) -> Meters:
        """Of the model version."""

    @property
    def arena(self) -> Arena | None:
        """Where large bodies are put; None: they travel in frames."""

    async def submit(self, request: Request) -> Reply:
        """See `Dispatcher.submit`."""

    def begin(self, request: Request) -> None:
        """See `Dispatcher.begin`."""

    def withdraw(self, request: Request) -> None:
        """See `Dispatcher.withdraw`."""

    def finish(self, request: Request, answered: bool) -> None:
        """See `Dispatcher.finish`."""


class Model(Protocol):
    """One model version."""

    @property
    def spec(self) -> Spec:
        """What it is."""

    @property
    def gone(self) -> bool:
        """It is unregistered, and takes no requests any more."""

    @property
    def dispatcher(self) -> Dispatching:
        """Takes its requests."""

    @property
    def stream_stall_timeout(self) -> float:
        """Seconds for which a stream's client may take no byte."""


class Numbers(Protocol):
    """The server's metrics, as far as they come from here."""

    in_flight: Callable[[], int]

    def answered(self, status: int) -> None:
        """Counts an answer."""


class Models(Protocol):
    """All model versions."""

    @property
    def metrics(self) -> Numbers:
        """Of the server."""

    def find(self, name: str, version: str | None = None) -> Model:
        """See `Registry.find`."""

    def only(self) -> Model | None:
        """See `Registry.only`."""
