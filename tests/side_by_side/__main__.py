"""See the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.side_by_side import comparison
from tests.side_by_side.archives import build_store
from tests.side_by_side.differences import REASONS
from tests.side_by_side.lives import LIVES

RECORDED = Path(__file__).parent / "recorded.json"
OURS = (sys.executable, "-m", "minserve", "torchserve")


def main() -> int:
    """Runs both, prints the comparison; 1 if there is a difference without a reason."""
    parser = argparse.ArgumentParser(prog="python -m tests.side_by_side", description="TorchServe against minserve")
    parser.add_argument(
        "--torchserve", type=Path, help="bin folder of its environment; without it the recorded answers"
    )
    parser.add_argument(
        "--record", action="store_true", help="keep TorchServe's answers in recorded.json, run nothing else"
    )
    parser.add_argument("--life", action="append", help="only this one", choices=[life.name for life in LIVES])
    arguments = parser.parse_args()
    lives = [life for life in LIVES if not arguments.life or life.name in arguments.life]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("store", "work", "theirs", "ours"):
            (folder / part).mkdir()
        store = folder / "store"
        if arguments.torchserve is None:
            build_store(store, folder / "work", (sys.executable, "-m", "minserve", "archive"))
            theirs = comparison.read(RECORDED)
        else:
            bin_ = arguments.torchserve.absolute()
            build_store(store, folder / "work", (str(bin_ / "torch-model-archiver"),))
            environ = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}
            theirs = comparison.live([str(bin_ / "torchserve")], environ, folder / "theirs", store, lives)
        if arguments.record:
            before = comparison.read(RECORDED) if arguments.life and RECORDED.exists() else {}
            comparison.write({**before, **theirs}, RECORDED)
            print(f"{len(theirs)} answers recorded")
            return 0
        ours = comparison.live(OURS, os.environ, folder / "ours", store, lives)
    theirs = {name: answer for name, answer in theirs.items() if name in ours}
    differences = comparison.compare(theirs, ours)
    unexplained = [difference for difference in differences if not difference.explained]
    for difference in differences:
        print(f"{difference}\n  reason: {REASONS[difference.name].why if difference.explained else 'NONE'}\n")
    print(
        f"{len(theirs)} comparisons, {len(theirs) - len(differences)} equal, "
        f"{len(differences) - len(unexplained)} differ with a reason, {len(unexplained)} without"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
