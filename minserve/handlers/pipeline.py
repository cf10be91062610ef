"""Pipeline parallelism for inference: every rank has some of the layers and passes its activations on.

    first stage ──activations──▶ stage 1 ──▶ … ──▶ last stage
        ▲                                              │
        └───────────────── result ─────────────────────┘

No stage waits for the next one: while it works on a batch, this one takes up the batch behind it. On the first stage, which
needs the result, `run` lets the rank begin other batches meanwhile (rank/overlap.py).

Our own send and receive, not `torch.distributed.pipelining`: its stages have a fixed shape, and requests do not.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from minserve.handlers import ring
from minserve.handlers.activations import Outgoing, pack, pack_failure, unpack_failure
from minserve.handlers.hops import Message, Sending
from minserve.handlers.moves import Moves
from minserve.handlers.settings import take_down_settings
from minserve.rank import overlap, streaming
from minserve.rank.failures import StageError, describe, is_collective, issued_collectives
from minserve.rank.order import Ticket

Stage = Callable[..., Tensor | Sequence[Tensor]]

# Messages that the next stage (or a socket) may not have taken yet when this one has the following ready: it works on one
# batch while the one before waits there. More would be memory for nothing.
MOST_UNTAKEN = 1

_of_rank: list[Pipeline] = []  # a rank has one model


class Pipeline:
    """This rank's place in the pipeline, and the way through it.

    Attributes:
        stage: this rank's stage, 0 … stages - 1.
        stages: their number.
        is_first: this rank starts the batch and gets the result.
        is_last: this rank makes the result.
    """

    def __init__(self, device: torch.device, mesh: DeviceMesh | None = None) -> None:
        """Finds this rank's place. A collective call: every rank makes it.

        Args:
            device: where activations arrive.
            mesh: of `build_mesh`: each column is a pipeline of its own, its result returns to its own first stage.
                None: every rank of the world is a stage; a single process is one stage and sends nothing.
        """
        self._device = device
        group = dist.group.WORLD if mesh is None else mesh.get_group("pp")  # WORLD is None in a single process
        self._ranks = [0] if group is None else dist.get_process_group_ranks(group)
        first_stage = self._ranks[:1] if mesh is None else _first_stage(mesh)
        self._needs = tuple(first_stage)
        self.stages = len(self._ranks)
        self.stage = 0 if group is None else dist.get_rank(group)
        self.is_first = self.stage == 0
        self.is_last = self.stage == self.stages - 1
        self._runs_outside = 0  # of batches: while the handler loads, or without a server around it
        self._early: dict[Ticket, Message] = {}  # what came for a later batch
        self._untaken: deque[Sending] = deque()
        self._told: list[Sending] = []  # failures, of which nothing that follows has told yet that they are out
        if group is not None and self.stages > 1:
            self._outlet, self._inlet = ring.join(group, device)
            _of_rank.append(self)
            if device.type == "cuda":
                self._results: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
            self._offer_overlap(first_stage)

    def _offer_overlap(self, first_stage: list[int]) -> None:
        """Tells the rank that it may have several batches at work: one for each stage, and one that waits in front."""
        moves = Moves(first_stage) if self.is_first and len(first_stage) > 1 else None
        leads = dist.get_rank() == first_stage[0]
        tell = moves.tell if moves is not None and leads else None
        hear = moves.hear if moves is not None and not leads else None
        overlap.offer(overlap.Plan(self.stages + 1, self.is_first, take_down_settings, tell, hear))

    def share(self, layers: int) -> range:
        """The layers of this stage, dealt out as evenly as they go: `for i in pipeline.share(6)`.

        Raises:
            ValueError: there are fewer layers than stages.
        """
        if layers < self.stages:
            raise ValueError(f"{layers} layers cannot be split over {self.stages} stages")
        return range(layers * self.stage // self.stages, layers * (self.stage + 1) // self.stages)

    def run(self, stage: Stage, *inputs: Tensor) -> tuple[Tensor, ...] | None:
        """Takes one batch through all stages. Every rank calls it, with its own stage function, and as often as the others.

        On the first stage other batches may run the handler's code while this one waits for its result; what it has set on
        the handler before is put back then.

        Args:
            stage: takes the tensors that the stage before returned (the first one: `inputs`), returns one tensor or
                several: up to 8, any shapes and dtypes, which may change from call to call.
            inputs: used on the first stage only.

        Returns:
            On the first stage what the last one returned; None on all others.

        Raises:
            StageError: a stage raised. On its own rank, on every later one and on the first, so that all ranks leave
                the batch in step; those in between have done their part and return None, but raise it in a further run.
            RuntimeError, torch.distributed.DistError: the group is broken; the ranks are not in step any more.
        """
        if self.stages == 1:
            return _as_tuple(stage(*inputs))
        batch, issued = streaming.current(), issued_collectives()
        try:
            if self.is_first:
                return self._run_first(stage, inputs, self._ticket(batch), batch, issued)
            self._run_later(stage, self._ticket(batch), batch is not None)
            return None
        finally:
            if batch is not None:
                batch.apart += issued_collectives() - issued

    def _ticket(self, batch: streaming.Chunks | None) -> Ticket:
        if batch is None:
            self._runs_outside += 1
            return Ticket(0, self._runs_outside)
        batch.runs += 1
        batch.at_end = None  # the handler has caught what failed, and goes on
        return Ticket(batch.seq, batch.runs)

    def _run_first(
        self, stage: Stage, inputs: tuple[Tensor, ...], ticket: Ticket, batch: streaming.Chunks | None, issued: int
    ) -> tuple[Tensor, ...]:
        carried = self._work(stage, inputs, ticket)
        told, self._told = self._told, []  # kept until this run is over, for then they are out, too
        sending = self._outlet.send(self._message(carried, ticket))
        # It takes what comes round even if it has failed itself: a message left behind would be out of step.
        answer = self._await_result(ticket, batch is not None, issued)
        sending.wait()  # the result says that it is over
        del told
        if isinstance(carried, StageError):
            raise carried
        if not answer.failed:
            return answer.tensors
        failure = unpack_failure(answer.tensors[0], self._needs)
        if batch is not None and self._ranks.index(failure.origin) > 1:
            batch.at_end = functools.partial(_tell_those_between, failure, Ticket(ticket.seq, ticket.run + 1))
        raise failure

    def _tell(self, failure: StageError, ticket: Ticket) -> None:
        """Lets a run fail that this stage does not come to.

        Nothing is waited for: whoever has left the batch takes the message when the next one comes.
        """
        with contextlib.suppress(RuntimeError):  # the next stage has ended, which the server sees
            self._told.append(self._outlet.send(pack_failure(failure, self._device, ticket)))

    def _run_later(self, stage: Stage, ticket: Ticket, in_batch: bool) -> None:
        received = self._receive_activations(ticket)
        if received.failed:
            carried: Outgoing | StageError = unpack_failure(received.tensors[0], self._needs)
        else:
            carried = self._work(stage, received.tensors, ticket)
        self._leave(self._outlet.send(self._message(carried, ticket)), in_batch)
        if isinstance(carried, StageError):
            raise carried

    def _leave(self, sending: Sending, in_batch: bool) -> None:
        """Goes on while a message is on its way, unless too many are.

        A socket's results are never waited for. The first stage leaves them there while another batch has its turn, and in
        that turn may be a collective, to which this rank has to come. They are no more than there are batches under way.
        """
        if in_batch and self.is_last and self._outlet.copies:
            return
        self._untaken.append(sending)
        while len(self._untaken) > (MOST_UNTAKEN if in_batch else 0):  # outside, the process may end with this run
            self._untaken.popleft().wait()

    def _work(self, stage: Stage, inputs: tuple[Tensor, ...], ticket: Ticket) -> Outgoing | StageError:
        """Runs the stage. An `Exception` becomes the failure to pass on; minserve.Cancelled is none and flies."""
        try:
            return pack(_as_tuple(stage(*inputs)), self._device, ticket, copy=not self._outlet.copies)
        except Exception as error:
            if is_collective(error):
                raise
            failure = self._describe(error)
            failure.__cause__ = error
            return failure

    def _describe(self, error: Exception) -> StageError:
        described = describe(error, dist.get_rank(), dist.get_world_size())
        return StageError(
            described.origin, described.type_name, described.text, described.place, self._needs, described.status
        )

    def _message(self, carried: Outgoing | StageError, ticket: Ticket) -> Outgoing:
        return pack_failure(carried, self._device, ticket) if isinstance(carried, StageError) else carried

    def _receive_activations(self, ticket: Ticket) -> Message:
        """What the stage before sends for this run.

        Only the first stage begins a batch before it is through with another: the first run of a later batch may come in
        front of a further run of this one. Anything else is a rank that has lost step.
        """
        while ticket not in self._early:
            message = self._inlet.receive()
            came = message.ticket
            if message.failed and came.seq < ticket.seq:
                continue  # for those that have not left that batch, see `_tell_those_between`
            if came != ticket and not (came.seq > ticket.seq and came.run == 1 and ticket.run > 1):
                raise RuntimeError(f"pipeline out of step: {came} came to stage {self.stage}, awaited: {ticket}")
            self._early[came] = message
        return self._early.pop(ticket)

    def _await_result(self, ticket: Ticket, in_batch: bool, issued: int) -> Message:
        loop = overlap.active() if in_batch else None
        receive_one = self._receive_result
        ready = self._inlet.ready
        message = receive_one() if loop is None else loop.await_result(ticket, issued, receive_one, ready)
        if message.ticket != ticket:
            raise RuntimeError(f"pipeline out of step: the result of {message.ticket} came, awaited: {ticket}")
        if self._device.type == "cuda":
            # It came on another stream, whose memory is not to be used again before this one is done with it.
            for tensor in message.tensors:
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return message

    def _receive_result(self) -> Message:
        """The next result, of whichever batch. On CUDA in a stream of its own: the others' kernels do not wait for it."""
        if self._device.type != "cuda":
            return self._inlet.receive()
        with torch.cuda.stream(self._results):
            message = self._inlet.receive()
        self._results.synchronize()
        return message


def _tell_those_between(failure: StageError, ticket: Ticket) -> None:
    """The first stage leaves a batch after a failure: the next run fails, too, for the stages that wait for it.

    They lie in front of the one that has failed, and have heard nothing of it. Which pipeline they run next is their affair.
    """
    for pipeline in _of_rank:
        if pipeline.is_first:
            pipeline._tell(failure, ticket)


def _first_stage(mesh: DeviceMesh) -> list[int]:
    """Global ranks of the first stage, of all columns."""
    assert mesh.mesh_dim_names is not None
    ranks: list[int] = mesh.mesh.select(mesh.mesh_dim_names.index("pp"), 0).flatten().tolist()
    return ranks


def _as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
