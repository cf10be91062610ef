"""Faults by name. Each is what the kernel, an operator or a bug does to a process, not a switch inside minserve."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """A signal to a rank, or to the torchrun above all ranks. A `lethal` one ends the worker, which is then restarted."""

    signal: signal.Signals
    lethal: bool = True
    torchrun: bool = False


FAULTS: Mapping[str, Fault] = {
    "kill": Fault(signal.SIGKILL),
    "terminate": Fault(signal.SIGTERM),
    "crash": Fault(signal.SIGSEGV),
    "stop": Fault(signal.SIGSTOP, lethal=False),  # minserve finds it after stallTimeout
    "resume": Fault(signal.SIGCONT, lethal=False),
    "kill-torchrun": Fault(signal.SIGKILL, torchrun=True),
}


def find_fault(name: str) -> Fault:
    """The fault of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FAULTS:
        raise ValueError(f"fault: found {name!r}, allowed: {', '.join(FAULTS)}")
    return FAULTS[name]
