"""What goes from one pipeline stage to the next: a header of fixed size, then the bytes of each tensor.

Why a header: the receiver has to know how much follows. gloo lets a message that is shorter than the buffer pass and leaves
old rows behind it; a longer one aborts the process.

    header   85 int64, the same on every hop, so that its own length always matches:
             magic, seq, run, failed, count, then 8 times (dtype, dimensions, 8 sizes)
    payload  bytes, one for each tensor that has elements; after a failure one, its description as JSON
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.rank.failures import StageError
from minserve.rank.order import Ticket

MAX_TENSORS = 8
MAX_DIMS = 8
HEADER_LENGTH = 5 + MAX_TENSORS * (2 + MAX_DIMS)
_MAGIC = 0x6D696E73657276  # "minserv"

# Both ends run the same code, so the place in this tuple says which dtype it is.
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES)}
_PADDING = (0,) * MAX_DIMS


class Spec(NamedTuple):
    """A tensor as the header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of its payload."""
        return math.prod(self.shape) * self.dtype.itemsize


class Outgoing(NamedTuple):
    """A message to be sent.

    Attributes:
        header: `HEADER_LENGTH` numbers.
        payloads: of bytes, none of them empty.
    """

    header: list[int]
    payloads: list[Tensor]


class Header(NamedTuple):
    """What follows the header.

    Attributes:
        ticket: what it belongs to.
        failed: the payload is the description of a failure.
        specs: one for each tensor.
    """

    ticket: Ticket
    failed: bool
    specs: list[Spec]


def pack(
    tensors: Sequence[Tensor], device: torch.device, ticket: Ticket, *, failed: bool = False, copy: bool = True
) -> Outgoing:
    """Makes the message for some activations: the header, and their bytes.

    Everything that can be wrong with them is found here, before anything is sent.

    Args:
        device: where the bytes are to lie.
        copy: for a message that may still be on its way when the stage works on the next batch: a stage may return the same
            memory each time, a buffer that it keeps, what a captured CUDA graph writes to.

    Raises:
        TypeError: not a tensor, not one with memory of its own, not a dense one, or of a dtype that is not in `DTYPES`.
        ValueError: more than 8 tensors, or more than 8 dimensions.
    """
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"a stage passed on {len(tensors)} tensors; at most {MAX_TENSORS} fit")
    numbers = [_MAGIC, *ticket, int(failed), len(tensors)]
    for tensor in tensors:
        _check(tensor)
        dims = tensor.dim()
        numbers += [_NUMBERS[tensor.dtype], dims, *tensor.shape, *_PADDING[dims:]]
    numbers += [0] * (HEADER_LENGTH - len(numbers))
    return Outgoing(numbers, [_bytes_of(tensor, device, copy) for tensor in tensors if tensor.numel()])


def pack_failure(failure: StageError, device: torch.device, ticket: Ticket) -> Outgoing:
    """Makes the message that takes the place of the activations after a stage has failed."""
    described = [failure.origin, failure.type_name, failure.text, failure.place, failure.status]
    raw = bytearray(json.dumps(described).encode())
    return pack([torch.frombuffer(raw, dtype=torch.uint8)], device, ticket, failed=True)


def unpack_failure(payload: Tensor, needs: tuple[int, ...]) -> StageError:
    """Reads the failure that came in place of activations."""
    origin, type_name, text, place, status = json.loads(bytes(payload.cpu().tolist()))
    return StageError(origin, type_name, text, place, needs, status)


def read_header(header: Sequence[int]) -> Header:
    """Reads a received header.

    Raises:
        RuntimeError: it is none, so the ranks have lost step.
    """
    magic, seq, run, failed, count, *numbers = header
    if magic != _MAGIC:
        raise RuntimeError("pipeline out of step: what was received is no header")
    specs = []
    for start in range(0, count * (2 + MAX_DIMS), 2 + MAX_DIMS):
        dtype, dims, *shape = numbers[start : start + 2 + MAX_DIMS]
        specs.append(Spec(DTYPES[dtype], tuple(shape[:dims])))
    return Header(Ticket(seq, run), bool(failed), specs)


def _check(tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a stage must return tensors, not {type(tensor).__name__}")
    if tensor.dtype not in _NUMBERS or tensor.layout != torch.strided:
        raise TypeError(f"a stage cannot pass on a tensor of {tensor.dtype}, {tensor.layout}")
    if tensor.dim() > MAX_DIMS:
        raise ValueError(f"a stage passed on a tensor of {tensor.dim()} dimensions; at most {MAX_DIMS} fit")


def _bytes_of(tensor: Tensor, device: torch.device, copy: bool) -> Tensor:
    # A wrapper has no memory, but its copy may: what a collective of tensor parallelism has not brought yet (torch's
    # AsyncCollectiveTensor) is waited for.
    here = tensor.detach().to(device, copy=copy or type(tensor) is not Tensor)
    if hasattr(here, "__tensor_flatten__"):  # what torch.compile knows wrappers by
        raise TypeError(f"a stage must return plain tensors, not {type(tensor).__name__}")
    # As bytes: NCCL has no int16 and, in older versions, no float8.
    return here.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
