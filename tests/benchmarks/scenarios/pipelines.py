"""Two stages on two ranks against one process with the same threads: requests a second, and the latency of one alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.benchmarks.contest import OURS, Load, take_turns
from tests.benchmarks.plot import Panel
from tests.benchmarks.report import Aim, Findings, compare
from tests.benchmarks.workspace import HANDLERS, MODELS, Model

if TYPE_CHECKING:
    from pathlib import Path

    from tests.benchmarks.run import Run

SCENARIO = "pipelines, 2 stages"
CLIENTS = 8
IN_FLIGHT = "minserve:\n  inFlight: 4\n"  # more than the stages: the next one waits at the door
STAGES = (HANDLERS / "stages.py",)
# The ceiling: two processes with half of the layers each, which answer for themselves and pass nothing on.
HALF = Model("stages-half", STAGES, ranks=0, more="handler:\n  layers: 4\n", workers=2)
TEXT = "minserve puts any PyTorch code that runs under torchrun behind a plain HTTP endpoint. " * 3  # some 60 tokens
ALONE, PIPELINE, APART = "one process", "pipeline", "two halves that pass nothing on, whose answers count half"
BALANCED = "balanced"
FIGURES: tuple[tuple[int, str, str, Callable[[Load], float], Aim], ...] = (  # the aims are for balanced stages
    (CLIENTS, "requests/s", "", lambda load: load.requests_per_s, Aim("≥", 1.7)),
    (1, "p50", "ms", lambda load: load.p50_us / 1000, Aim("≤", 1.15)),
)


def measure(run: Run) -> Findings:
    """Balanced stages, and MiniLM, whose first stage has the tokenizer, too. batchSize 1: batches help either way."""
    pairs = {
        BALANCED: (
            Model("stages", STAGES, ranks=0),
            Model("stages-pp", STAGES, parallel="pp", more=IN_FLIGHT),
        ),
        "MiniLM": (
            Model("minilm", _minilm("minilm"), ranks=0),
            Model("minilm-pp", _minilm("minilm-pp"), parallel="pp", more=IN_FLIGHT),
        ),
    }
    rows, panels = [], []
    body = run.workspace.path / "text"
    body.write_text(TEXT)
    with run.server(OURS, [*(model for pair in pairs.values() for model in pair), HALF]) as up:
        for name, (alone, pipeline) in pairs.items():
            for clients, figure, unit, read, aim in FIGURES:
                balanced = name == BALANCED
                models = {PIPELINE: pipeline, ALONE: alone} | ({APART: HALF} if balanced and clients > 1 else {})
                contestants = {
                    key: replace(run.clients(up, model.name, clients), body=body, answer=None)
                    for key, model in models.items()
                }
                what = f"{figure}, {name}, {clients} client{'s' * (clients > 1)}"
                loads = take_turns(run, f"pipelines: {what}", contestants)
                ours, theirs = ([read(load) for load in loads[key]] for key in (PIPELINE, ALONE))
                aimed = aim if balanced else None
                rows.append(compare(SCENARIO, what, unit, ours, ALONE, theirs, aimed, headline=balanced))
                if APART in loads:
                    ceiling = [read(load) / 2 for load in loads[APART]]
                    rows.append(compare(SCENARIO, what, unit, ours, APART, ceiling))
                if clients > 1:
                    panels.append(Panel.of(f"{SCENARIO}: {what}", unit, {"minserve pp": ours, ALONE: theirs}))
    return Findings(rows, panels)


def _minilm(name: str) -> tuple[Path, ...]:
    files = sorted((MODELS / name).glob("*.py"), key=lambda file: file.name != "handler.py")
    return tuple(files)
