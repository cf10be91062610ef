"""The list of faults: what is done, to whom, what the client is due to see and how soon. Issue 4's table, as data."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.chaos.catalogue import Model


class Moment(enum.StrEnum):
    """When it happens, and by which means."""

    BATCH = "mid-batch"  # a request tells ranks to do it
    STREAM = "mid-stream"
    SIGNAL_IDLE = "idle"  # a signal from outside
    SIGNAL_BATCH = "mid-batch, from outside"
    SIGNAL_STREAM = "mid-stream, from outside"
    LOADING = "loading"
    CLIENT = "client"
    OPERATOR = "operator"


class Limit(enum.StrEnum):
    """Within what time it must be seen."""

    NONE = "none"
    DEATH = "death"
    AT_ONCE = "at once"
    GRACE = "errorGrace"
    STALL = "stallTimeout"
    RESPONSE = "responseTimeout"
    ACCEPT = "acceptTimeout"
    STARTUP = "startupTimeout"


class Who(enum.StrEnum):
    """Which ranks."""

    ONE = "one"
    ZERO = "zero"
    ALL = "all"
    NOT_ZERO = "not zero"
    AGENT = "agent"


Condition = Callable[[Model], bool]

# What names the culprit: it must be the first rank (or torchrun) that the message speaks of, with its pid.
BY = r"\A(?=.*{model}/\d)(?:(?!rank \d|torchrun \(pid).)*{who} \(pid {pid}\)"
# How the server tells a death whose exit status it could not read in time. It is counted, see `Row.vague`.
VAGUE = "closed its socket|vanished"
IN_STEP = r"\A(?=.*{model}/\d)(?=.*rank \d).*"


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        do: the order to the rank, the signal, or the name of what the client or the operator does.
        restarts: how many it costs the worker.
        statuses: of HTTP, for the requests that it hits.
        says: pattern for those requests' message, and for the worker's lastError if it costs a restart.
        fits: which models it can be done to.
        order: further fields of the order.
        spares: whether the request that it hits is answered right all the same.
    """

    name: str
    moment: Moment
    do: str
    who: Who = Who.ONE
    restarts: int = 1
    limit: Limit = Limit.DEATH
    statuses: frozenset[int] = frozenset({503})
    says: str = BY
    fits: Condition = lambda model: model.faulty
    order: Mapping[str, object] = field(default_factory=dict)
    spares: bool = False

    @property
    def restarting(self) -> bool:
        return self.restarts > 0


def _harmless(name: str, moment: Moment, do: str, fits: Condition, order: Mapping[str, object]) -> Fault:
    """Something that looks like a fault for a while, and must be left alone."""
    return Fault(name, moment, do, Who.ONE, 0, Limit.NONE, frozenset(), "(?!)", fits, order, spares=True)


def _ended(how: str) -> str:
    return rf"{BY}.*(?:{how}|{VAGUE})"


def _batch(model: Model) -> bool:
    return model.faulty and not model.streams


def _group(model: Model) -> bool:
    return _batch(model) and model.ranks > 1


def _torch(model: Model) -> bool:
    return _batch(model) and model.handler != "plain"


def _reduces(model: Model) -> bool:
    """All its ranks meet in a collective."""
    return model.faulty and model.handler == "tp" and model.ranks > 1


def _streams(model: Model) -> bool:
    return model.faulty and model.streams


def _under_torchrun(model: Model) -> bool:
    return model.faulty and model.handler != "plain"


def _slow_to_give_up(model: Model) -> bool:
    """Models whose acceptTimeout and startupTimeout a run can afford to wait for."""
    return model.name in ("plain", "plain-tcp", "tp2")


_REFUSED = frozenset({502, 503})
_TIMEOUT = frozenset({504})


def _lie(name: str, moment: Moment, do: str, fits: Condition) -> Fault:
    """A rank sends what the protocol forbids."""
    return Fault(name, moment, do, limit=Limit.AT_ONCE, statuses=_REFUSED, fits=fits)


def _in_batch() -> list[Fault]:
    """Told by a request, done by a rank in the middle of its batch."""
    at, one = Moment.BATCH, Who.ONE
    return [
        Fault("os._exit(7)", at, "exit", says=_ended("exited with code 7"), fits=_batch, order={"code": 7}),
        Fault("exit 0", at, "exit", says=_ended("exited with code 0"), fits=_batch, order={"code": 0}),
        Fault("exit 137", at, "exit", statuses=frozenset({507}), says=_ended("137"), fits=_batch, order={"code": 137}),
        Fault("segfault", at, "segfault", says=_ended("SIGSEGV"), fits=_batch),
        Fault("closes its socket, lives on", at, "close", says=BY + ".*closed its socket", fits=_batch),
        Fault("hangs up", at, "hang_up", fits=_batch),
        Fault("raises on one rank, others wait", at, "raise_own", limit=Limit.GRACE,
              says=BY + ".*ValueError: told to fail on rank {rank}", fits=_reduces),
        Fault("raises on one rank, others fail in the collective first", at, "raise_behind_the_victims",
              limit=Limit.GRACE, says=BY + ".*ValueError: told to fail on rank {rank}", fits=_reduces),
        Fault("raises something else on each rank", at, "raise_different", Who.ALL, limit=Limit.GRACE,
              says=r"{model}/\d.*rank \d \(pid \d+\).*(KeyError|ValueError)", fits=_reduces),
        Fault("torch.distributed error on all ranks", at, "raise_collective", Who.ALL, limit=Limit.AT_ONCE,
              says=r"{model}/\d.*rank \d \(pid \d+\).*DistBackendError", fits=_torch),
        Fault("device error on all ranks", at, "raise_device", Who.ALL, limit=Limit.AT_ONCE,
              says=r"{model}/\d.*rank \d \(pid \d+\).*CUDA error", fits=_torch),
        Fault("infinite loop in Python", at, "loop", limit=Limit.RESPONSE, statuses=_TIMEOUT, fits=_batch),
        Fault("C call that holds the GIL", at, "gil", limit=Limit.STALL, statuses=_TIMEOUT, fits=_batch),
        Fault("never enters the collective", at, "linger", limit=Limit.RESPONSE, statuses=_TIMEOUT, fits=_batch),
        Fault("leaves the batch without the collective", at, "skip", Who.NOT_ZERO, limit=Limit.RESPONSE,
              statuses=_TIMEOUT, fits=_reduces),
        Fault("hangs when rank 0 has answered", at, "linger", Who.NOT_ZERO, limit=Limit.RESPONSE, statuses=_TIMEOUT,
              fits=lambda model: _reduces(model) and _batch(model) and "replyAfter: all" not in model.options,
              order={"moment": "after"}, spares=True),
        _lie("garbage on the socket", at, "garbage", _batch),
        _lie("reply for an unknown request", at, "unknown_request", _batch),
        _lie("wrong seq", at, "seq_nobody_sent", _batch),
        _lie("frame kind that only the server sends", at, "forbidden_kind", _batch),
        _lie("oversize frame", at, "oversize", _batch),
        _lie("half a frame", at, "half_a_frame", _batch),
        # ── and those that cost no restart ──
        Fault("raises alike on all ranks", at, "raise", Who.ALL, 0, Limit.AT_ONCE,
              says=IN_STEP + "ValueError: told to fail", fits=_batch),
        Fault("raises in a pipeline stage", at, "raise_own", one, 0, Limit.AT_ONCE,
              says=IN_STEP + "ValueError: told to fail on rank {rank}",
              fits=lambda model: model.faulty and model.handler == "pp", order={"moment": "stage"}),
        Fault("raises with a status of its own", at, "raise_coded", Who.ALL, 0, Limit.AT_ONCE, frozenset({418}),
              r"\Atold to be a teapot\Z", _batch),
        Fault("out of memory on all ranks", at, "raise_memory", Who.ALL, 0, Limit.AT_ONCE, frozenset({507}),
              IN_STEP + "MemoryError", _batch),
        Fault("too many answers", at, "bad_count", Who.ZERO, 0, Limit.AT_ONCE, says=IN_STEP + "answers", fits=_batch),
        Fault("answer that cannot be sent", at, "bad_type", Who.ZERO, 0, Limit.AT_ONCE,
              says=IN_STEP + "model output", fits=_batch),
        _harmless("slow, below responseTimeout", at, "sleep", _batch, {"seconds": 3.0}),
        _harmless("holds the GIL below stallTimeout", at, "gil", _batch, {"seconds": 1.0}),
    ]  # fmt: skip


def _in_stream() -> list[Fault]:
    """The same, between two steps of a stream."""
    at = Moment.STREAM
    return [
        Fault("os._exit(7)", at, "exit", says=_ended("exited with code 7"), fits=_streams, order={"code": 7}),
        Fault("segfault", at, "segfault", says=_ended("SIGSEGV"), fits=_streams),
        Fault("closes its socket, lives on", at, "close", says=BY + ".*closed its socket", fits=_streams),
        Fault("raises on one rank, others wait", at, "raise_own", limit=Limit.GRACE,
              says=BY + ".*ValueError: told to fail on rank {rank}", fits=_streams),
        Fault("raises alike on all ranks", at, "raise", Who.ALL, 0, Limit.AT_ONCE,
              says=IN_STEP + "ValueError: told to fail", fits=_streams),
        Fault("C call that holds the GIL", at, "gil", limit=Limit.STALL, statuses=_TIMEOUT, fits=_streams),
        Fault("never enters the collective", at, "linger", limit=Limit.RESPONSE, statuses=_TIMEOUT, fits=_streams),
        _lie("garbage on the socket", at, "garbage", _streams),
        _harmless("slow, below responseTimeout", at, "sleep", _streams, {"seconds": 3.0}),
    ]  # fmt: skip


def _from_outside() -> list[Fault]:
    idle, batch, stream = Moment.SIGNAL_IDLE, Moment.SIGNAL_BATCH, Moment.SIGNAL_STREAM
    killed, crashed = _ended("SIGKILL"), _ended("SIGSEGV")
    return [
        Fault("SIGKILL of a rank", idle, "SIGKILL", says=killed),
        Fault("SIGKILL of a rank", batch, "SIGKILL", says=killed, fits=_batch),
        Fault("SIGKILL of a rank", stream, "SIGKILL", says=killed, fits=_streams),
        Fault("SIGSEGV of a rank", idle, "SIGSEGV", says=crashed),
        Fault("SIGSEGV of a rank", batch, "SIGSEGV", says=crashed, fits=_batch),
        Fault("SIGTERM of a rank", batch, "SIGTERM", says=_ended("SIGTERM"), fits=_batch),
        Fault("SIGSTOP of a rank", idle, "SIGSTOP", limit=Limit.STALL, statuses=_TIMEOUT),
        Fault("SIGSTOP of a rank", batch, "SIGSTOP", limit=Limit.STALL, statuses=_TIMEOUT, fits=_batch),
        Fault("SIGSTOP of a rank", stream, "SIGSTOP", limit=Limit.STALL, statuses=_TIMEOUT, fits=_streams),
        Fault("SIGKILL of torchrun", idle, "SIGKILL", Who.AGENT, says=killed, fits=_under_torchrun),
        Fault("SIGKILL of torchrun", batch, "SIGKILL", Who.AGENT, says=killed,
              fits=lambda model: _under_torchrun(model) and not model.streams),
        Fault("SIGKILL of torchrun", stream, "SIGKILL", Who.AGENT, says=killed, fits=_streams),
        Fault("SIGKILL, in-flight request is retried", batch, "SIGKILL", says=killed, statuses=frozenset(),
              fits=lambda model: model.retries, spares=True),
        _harmless("SIGSTOP and SIGCONT below stallTimeout", batch, "SIGCONT", _batch, {}),
    ]  # fmt: skip


def _while_loading() -> list[Fault]:
    """The worker is killed, and its next start meets this. `restarts` counts both."""
    at = Moment.LOADING
    connect, load = {"stage": "connect"}, {"stage": "load"}
    return [
        Fault("os._exit(7)", at, "exit", restarts=2, says=_ended("exited with code 7"), order={**load, "code": 7}),
        Fault("SIGKILL of a rank", at, "signal", restarts=2, says=_ended("SIGKILL"), order={**load, "signal": "SIGKILL"}),
        Fault("segfault", at, "segfault", restarts=2, says=_ended("SIGSEGV"), order=load),
        Fault("SIGKILL of torchrun", at, "kill_the_agent", Who.AGENT, 2, says=_ended("SIGKILL"), fits=_under_torchrun,
              order=load),
        Fault("raises on one rank", at, "raise_own", restarts=2, limit=Limit.AT_ONCE,
              says=BY + ".*ValueError: told to fail on rank {rank}", order=load),
        Fault("closes its socket, lives on", at, "close", restarts=2, says=BY + ".*closed its socket", order=load),
        Fault("never finishes loading", at, "linger", restarts=2, limit=Limit.STARTUP,
              says=r"{model}/\d.*rank {rank}\b", fits=_slow_to_give_up, order=load),
        Fault("never connects", at, "linger", restarts=2, limit=Limit.ACCEPT,
              says=r"{model}/\d.*rank {rank}\b", fits=_slow_to_give_up, order=connect),
        Fault("dies before it connects", at, "exit", restarts=2, limit=Limit.ACCEPT,
              says=r"{model}/\d.*(rank {rank}\b|torchrun|exited)", fits=_slow_to_give_up, order={**connect, "code": 7}),
        Fault("SIGSTOP of a rank", at, "signal", restarts=2, limit=Limit.STARTUP,
              says=r"{model}/\d.*rank {rank}\b", fits=_slow_to_give_up, order={**load, "signal": "SIGSTOP"}),
        Fault("connects late", at, "sleep", restarts=1, limit=Limit.NONE, order={**connect, "seconds": 1.0}),
    ]  # fmt: skip


def _clients_and_operators() -> list[Fault]:
    """They cost no restart, and no request of anybody else."""

    def fault(name: str, do: str, fits: Condition, statuses: frozenset[int] = frozenset(), says: str = "(?!)") -> Fault:
        return Fault(name, Moment.CLIENT, do, Who.ZERO, 0, Limit.NONE, statuses, says, fits)

    deadline = "within the request's deadline"
    return [
        fault("client leaves the queue", "leave_the_queue", _batch),
        fault("client leaves in flight", "leave_in_flight", _batch),
        fault("deadline passes in flight", "deadline_in_flight", _batch, _TIMEOUT, deadline),
        fault("deadline passes in the queue", "deadline_in_the_queue", _batch, _TIMEOUT, deadline),
        fault("storm of cancelled requests", "storm", _batch, _TIMEOUT, deadline),
        fault("client leaves its stream", "leave_the_stream", _streams),
        fault("client leaves a stream of rank 0 alone", "leave_a_stream_of_rank_0", _streams),
        fault("client leaves a stream from a thread", "leave_a_stream_of_a_thread", _streams),
        fault("client reads its stream slowly", "read_slowly", _streams),
        fault("client reads nothing of its stream", "read_nothing", _streams),
        fault("stream of rank 0 alone", "stream_of_rank_0", _streams),
        fault("stream from a thread", "stream_of_a_thread", _streams),
        Fault("reload under load", Moment.OPERATOR, "reload", Who.ZERO, 0, Limit.NONE, frozenset(), "(?!)"),
        Fault("scale up and down", Moment.OPERATOR, "scale", Who.ZERO, 0, Limit.NONE, frozenset(), "(?!)",
              lambda model: model.scales),
    ]  # fmt: skip


def all_faults() -> list[Fault]:
    """Every kind but the end of the server itself, which `run` does once the others are through."""
    return [*_in_batch(), *_in_stream(), *_from_outside(), *_while_loading(), *_clients_and_operators()]


def title(fault: Fault) -> str:
    """Its row in the table."""
    return fault.name if fault.moment in (Moment.CLIENT, Moment.OPERATOR) else f"{fault.name} ({fault.moment})"
