"""Which fault happens to which model, in which order: a function of the seed alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from tests.chaos.catalogue import Model
from tests.chaos.faults import Fault, Moment, Who, all_faults, title


@dataclass(frozen=True)
class Injection:
    """One fault that will be done.

    Attributes:
        rank: the one that it happens to, 0 when it happens to all.
    """

    number: int
    fault: Fault
    model: Model
    rank: int

    @property
    def title(self) -> str:
        return title(self.fault)

    def __str__(self) -> str:
        at = f" rank {self.rank}" if self.fault.who in (Who.ONE, Who.NOT_ZERO) else ""
        return f"#{self.number} {self.title} at {self.model.name}{at}"


def plan(seed: int, models: tuple[Model, ...], restarting: int, others: int, only: str = "") -> list[Injection]:
    """Draws so many faults that cost a restart and so many that do not. Each kind comes once before any comes again.

    Args:
        only: a part of the title of those to draw from; "" is all.
    """
    rng = random.Random(seed)
    chosen = [
        *_draw(rng, [fault for fault in all_faults() if fault.restarting], models, restarting, only),
        *_draw(rng, [fault for fault in all_faults() if not fault.restarting], models, others, only),
    ]
    rng.shuffle(chosen)
    return [Injection(number, *choice) for number, choice in enumerate(chosen, 1)]


def _draw(
    rng: random.Random, kinds: list[Fault], models: tuple[Model, ...], count: int, only: str
) -> list[tuple[Fault, Model, int]]:
    kinds = [kind for kind in kinds if only.lower() in title(kind).lower() and any(kind.fits(m) for m in models)]
    drawn: list[tuple[Fault, Model, int]] = []
    while kinds and len(drawn) < count:
        for fault in rng.sample(kinds, len(kinds))[: count - len(drawn)]:
            fitting = [model for model in models if fault.fits(model)]
            model = rng.choices(fitting, [model.weight for model in fitting])[0]
            drawn.append((fault, model, _rank(rng, fault, model)))
    return drawn


def _rank(rng: random.Random, fault: Fault, model: Model) -> int:
    if fault.who is Who.ONE:
        return rng.randrange(model.ranks)
    return rng.randrange(1, model.ranks) if fault.who is Who.NOT_ZERO else 0


def lanes(injections: list[Injection]) -> dict[Model, list[Injection]]:
    """The faults of each model, in order: those of one model follow each other, those of two may happen at once."""
    found: dict[Model, list[Injection]] = {}
    for injection in injections:
        found.setdefault(injection.model, []).append(injection)
    return found


def describe(injections: list[Injection]) -> str:
    """How many, of what, and at which ranks."""
    costly = sum(injection.fault.restarting for injection in injections)
    at = Counter(position for injection in injections if (position := _position(injection)))
    ranks = ", ".join(f"{at[position]} at {position}" for position in POSITIONS)
    return f"{len(injections)} faults, {costly} of which cost a restart ({ranks})"


POSITIONS = ("rank 0", "a middle rank", "the last rank", "the only rank", "all ranks")


def _position(injection: Injection) -> str:
    """Which of a group's ranks it happens to; "" for torchrun, clients and operators."""
    who, last = injection.fault.who, injection.model.ranks - 1
    if injection.fault.moment in (Moment.CLIENT, Moment.OPERATOR) or who is Who.AGENT:
        return ""
    if who is Who.ALL or not last:
        return "the only rank" if not last else "all ranks"
    return "rank 0" if not injection.rank else "the last rank" if injection.rank == last else "a middle rank"
