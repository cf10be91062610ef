"""`minserve replay`: plays recorded batches into a rank group, the same ones in the same order, and says how each ended."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import TYPE_CHECKING

from minserve.config.keys import ParallelType
from minserve.dispatch.request import Request
from minserve.errors import MinServeError
from minserve.recording import RecordingError
from minserve.worker.devices import DeviceAllocator
from minserve.worker.group import RankGroup
from minserve.worker.guardian import Guardian
from minserve.worker.reaper import Reaper
from minserve.worker.runtime import RuntimeDirectory
from minserve.worker.starter import Starter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from minserve.dispatch.request import Reply
    from minserve.playlist import Batch
    from minserve.telemetry.events import EventKind
    from minserve.worker.devices import Inventory
    from minserve.worker.spec import ModelSpec


LOOK_S = 0.02


class Replay:
    """A rank group that gets one batch after the other.

    Args:
        say: told one line for each batch.

    Attributes:
        failed: seqs of the batches that failed.
        death: what the group failed with, also if that was after the last answer.
        sent: how many batches it was sent.
    """

    def __init__(self, spec: ModelSpec, inventory: Inventory, environ: Mapping[str, str], say: Callable[[str], None]):
        self._spec = spec
        self._devices = DeviceAllocator(inventory)
        self._environ = environ
        self._say = say
        self._changed = asyncio.Event()
        self.failed: list[int] = []
        self.death: MinServeError | None = None
        self.sent = 0

    async def run(self, batches: Sequence[Batch]) -> None:
        """Starts the group, plays the batches, and ends it. Cancelling it leaves nothing behind.

        Raises:
            MinServeError: the group cannot be started.
        """
        runtime = RuntimeDirectory(self._environ)
        guardian = Guardian(runtime.path)
        reaper = Reaper()  # what a rank leaves behind comes to us, and is killed with its group
        starter = Starter(self._environ, runtime.path)
        try:
            await self._run(runtime.new_model_directory(), starter, batches)
        finally:
            await starter.close()
            reaper.close()
            runtime.remove()
            guardian.dismiss()

    async def _run(self, directory: Path, starter: Starter, batches: Sequence[Batch]) -> None:
        spec, options = self._spec, self._spec.config.minserve
        who = f"{spec.name}/0"
        group = RankGroup(
            *(spec, who, 0, directory, self._devices.reserve(who, spec.config, spec.world_size), starter),
            *(self._changed.set, _fail_all, _ignore_event),
        )
        group.failed.add_done_callback(lambda _: self._changed.set())
        try:
            await group.launch()
            await group.connect(min(options.accept_timeout, spec.startup_timeout))
            await group.load(spec.startup_timeout)
            await self._play(group, batches)
            # Rank 0 has answered; the others shall have the time. They show in shared memory how far they are.
            while not group.through and not group.failed.done():  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
            if group.failed.done():
                self.death = group.failed.result()
            await group.end(options.exit_timeout)
        finally:
            await asyncio.shield(group.kill())

    async def _play(self, group: RankGroup, batches: Sequence[Batch]) -> None:
        async with asyncio.TaskGroup() as under_way:
            for batch in batches:
                while not group.has_place(full=False) and not group.failed.done():  # nothing is sent ahead
                    self._changed.clear()
                    await self._changed.wait()
                if group.failed.done():
                    return
                requests = _requests(batch)
                group.send(requests)
                self.sent += 1
                under_way.create_task(self._watch(batch, requests))

    async def _watch(self, batch: Batch, requests: list[Request]) -> None:
        """Waits for the end of a batch and tells of it."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        ends = await asyncio.gather(*(_read(request.reply) for request in requests))
        error = next(filter(None, ends), None)
        if error is not None:
            self.failed.append(batch.seq)
        count = f"{len(requests)} request{'s' if len(requests) != 1 else ''}"
        line = f"batch {batch.seq}: {count}, {error or 'ok'}, {loop.time() - began:.3f} s"
        self._say(line + _compared(batch, error))


def with_ranks(spec: ModelSpec, nproc: int | None) -> ModelSpec:
    """The model with `nproc` ranks, under torchrun unless that is one; None leaves it as it is.

    Raises:
        RecordingError: it cannot have so many.
    """
    if nproc is None or nproc == spec.world_size:
        return spec
    if nproc < 1:
        raise RecordingError(f"nproc: found {nproc}, allowed: an integer >= 1")
    kind = spec.config.parallel_type
    if kind is ParallelType.CUSTOM:
        raise RecordingError(f"nproc: found {nproc}, allowed with parallelType custom, which is one process: 1")
    torchrun = spec.config.torchrun.model_copy(update={"nproc_per_node": nproc})
    changes = {"torchrun": torchrun, "parallel_level": None, "parallel_type": kind or ParallelType.TP}
    config = spec.config.model_copy(update=changes)
    return dataclasses.replace(spec, config=config, world_size=nproc)


def _requests(batch: Batch) -> list[Request]:
    loop = asyncio.get_running_loop()
    bodies = iter(batch.bodies)
    return [
        Request(meta, [next(bodies) for _ in meta.parts], math.inf, loop.create_future()) for meta in batch.requests
    ]


async def _read(reply: asyncio.Future[Reply]) -> MinServeError | None:
    """Takes an answer to its end, as a client would: a stream goes on only while somebody reads it. Its error, if any."""
    try:
        stream = (await reply).stream
        while stream is not None and await stream.take(1):
            continue
    except MinServeError as error:
        return error
    return None


def _compared(batch: Batch, error: MinServeError | None) -> str:
    """What the recording says where it says something else."""
    if batch.error is None:
        return "; had not ended when the recording did"
    if bool(batch.error) == (error is not None):
        return ""
    return f"; recorded: {batch.error or 'ok'}"


def _fail_all(requests: list[Request], error: MinServeError, begun: bool) -> None:
    for request in requests:
        request.fail(error)


def _ignore_event(kind: EventKind, detail: str, rank: int, pid: int) -> None:
    """The error of the batch says the same."""
