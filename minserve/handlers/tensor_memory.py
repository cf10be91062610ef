"""The memory of a tensor as Python's buffer, which torch offers through numpy alone, and numpy may not be installed."""

from __future__ import annotations

import ctypes
from typing import cast

from torch import Tensor

_PyBUF_WRITE = 0x200  # of CPython's headers; it has no name in Python
_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in the memory of the CPU that has some. Valid as long as the tensor lives."""
    return cast("memoryview", _view(tensor.data_ptr(), tensor.nbytes, _PyBUF_WRITE))
