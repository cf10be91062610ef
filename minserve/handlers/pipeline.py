"""Pipeline parallelism for inference: every rank has some of the layers and passes its activations on.

    first stage ──activations──▶ stage 1 ──▶ … ──▶ last stage
        ▲                                              │
        └───────────────── result ─────────────────────┘

Our own send and receive, not `torch.distributed.pipelining`: its stages have a fixed shape, and requests do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from minserve.handlers.activations import HEADER_LENGTH, pack, pack_failure, read_header, unpack_failure
from minserve.rank.failures import StageError, describe, is_collective

Stage = Callable[..., Tensor | Sequence[Tensor]]


class Pipeline:
    """This rank's place in the pipeline, and the way through it.

    Attributes:
        stage: this rank's stage, 0 … stages - 1.
        stages: their number.
        is_first: this rank starts the batch and gets the result.
        is_last: this rank makes the result.
    """

    def __init__(self, device: torch.device, mesh: DeviceMesh | None = None) -> None:
        """Finds this rank's place.

        Args:
            device: where activations arrive.
            mesh: of `build_mesh`: each column is a pipeline of its own, its result returns to its own first stage.
                None: every rank of the world is a stage; a single process is one stage and sends nothing.
        """
        self._device = device
        self._group = dist.group.WORLD if mesh is None else mesh.get_group("pp")  # WORLD is None in a single process
        self._ranks = [0] if self._group is None else dist.get_process_group_ranks(self._group)
        self._needs = tuple(self._ranks[:1] if mesh is None else _first_stage(mesh))
        self.stages = len(self._ranks)
        self.stage = 0 if self._group is None else dist.get_rank(self._group)
        self.is_first = self.stage == 0
        self.is_last = self.stage == self.stages - 1

    def share(self, layers: int) -> range:
        """The layers of this stage, dealt out as evenly as they go: `for i in pipeline.share(6)`.

        Raises:
            ValueError: there are fewer layers than stages.
        """
        if layers < self.stages:
            raise ValueError(f"{layers} layers cannot be split over {self.stages} stages")
        return range(layers * self.stage // self.stages, layers * (self.stage + 1) // self.stages)

    def run(self, stage: Stage, *inputs: Tensor) -> tuple[Tensor, ...] | None:
        """Takes one batch through all stages. Every rank calls it, with its own stage function.

        Args:
            stage: takes the tensors that the stage before returned (the first one: `inputs`), returns one tensor or
                several: up to 8, any shapes and dtypes, which may change from call to call.
            inputs: used on the first stage only.

        Returns:
            On the first stage what the last one returned; None on all others.

        Raises:
            StageError: a stage raised. On its own rank, on every later one and on the first, so that all ranks leave
                the batch in step; those in between have done their part and return None.
            RuntimeError, torch.distributed.DistError: the group is broken; the ranks are not in step any more.
        """
        if self.stages == 1:
            return _as_tuple(stage(*inputs))
        received = inputs if self.is_first else self._receive()
        carried = received if isinstance(received, StageError) else self._work(stage, received)
        self._send(pack_failure(carried, self._device) if isinstance(carried, StageError) else carried)
        # The first stage takes what comes round even if it has failed itself: a message left behind would be taken for
        # the answer to the next batch.
        answer = self._receive() if self.is_first else None
        if isinstance(carried, StageError):
            raise carried
        if isinstance(answer, StageError):
            raise answer
        return answer

    def _work(self, stage: Stage, inputs: tuple[Tensor, ...]) -> list[Tensor] | StageError:
        """Runs the stage. An `Exception` becomes the failure to pass on; minserve.Cancelled is none and flies."""
        try:
            return pack(_as_tuple(stage(*inputs)), self._device)
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

    def _send(self, message: list[Tensor]) -> None:
        """Sends to the next stage; the last one's next is the first.

        Blocking: gloo has read the buffers when `send` returns. NCCL reads them later, but this stream waits for it,
        and the allocator gives their memory to nothing else before that point of the stream.
        """
        following = self._ranks[(self.stage + 1) % self.stages]
        for part in message:
            dist.send(part, following, group=self._group)

    def _receive(self) -> tuple[Tensor, ...] | StageError:
        """Receives from the stage before; the first one's is the last. Every buffer is new, so nothing stale shows."""
        previous = self._ranks[self.stage - 1]
        header = torch.empty(HEADER_LENGTH, dtype=torch.int64, device=self._device)
        dist.recv(header, previous, group=self._group)
        failed, specs = read_header(header)
        tensors = []
        for spec in specs:
            payload = torch.empty(spec.nbytes, dtype=torch.uint8, device=self._device)
            if spec.nbytes:
                dist.recv(payload, previous, group=self._group)
            tensors.append(payload.view(spec.dtype).view(spec.shape))
        return unpack_failure(tensors[0], self._needs) if failed else tuple(tensors)


def _first_stage(mesh: DeviceMesh) -> list[int]:
    """Global ranks of the first stage, of all columns."""
    assert mesh.mesh_dim_names is not None
    ranks: list[int] = mesh.mesh.select(mesh.mesh_dim_names.index("pp"), 0).flatten().tolist()
    return ranks


def _as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
