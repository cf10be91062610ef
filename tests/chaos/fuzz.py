"""Fuzzes what a rank may send with atheris: `python -m tests.chaos.fuzz --seconds 60`, half of it on each entry.

    frames   any bytes, in pieces: frames or a WireError, within the limits; their meta a message or a WireError
    answers  the same bytes from a rank with batches under way: nobody is answered but by rank 0, in his own batch

A finding ends it with an error, and its input is written down. Without atheris it says so and ends in 0: there is no wheel
for every Python.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

ENTRIES = ("frames", "answers")
MAX_INPUT_BYTES = 4096


def main() -> int:
    """Runs every entry in a process of its own, for libFuzzer ends its process."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for all entries together (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of libFuzzer; 0: another every time")
    parser.add_argument("--entry", choices=ENTRIES, help="only this one, in this process, with the corpus in --corpus")
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print(
            f"no fuzzing: atheris is not installed, and has no wheel for every Python ({sys.version.split()[0]} here)"
        )
        return 0
    if arguments.entry:
        fuzz(arguments.entry, arguments.seconds, arguments.seed, arguments.corpus)
        return 0
    seconds = max(1, arguments.seconds // len(ENTRIES))
    return int(any(run(entry, seconds, arguments.seed) for entry in ENTRIES))


def run(entry: str, seconds: int, seed: int) -> bool:
    """Fuzzes one entry; whether something was found."""
    from tests.chaos import wire

    with tempfile.TemporaryDirectory(prefix="msf") as corpus:
        for number, stream in enumerate(wire.seeds()):
            for first in (0, 1, 128):
                (Path(corpus) / f"{number}-{first}").write_bytes(bytes([first]) + stream)
        command = [sys.executable, "-m", "tests.chaos.fuzz", "--entry", entry, "--corpus", corpus]
        command += ["--seconds", str(seconds), "--seed", str(seed)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = ended.stderr.splitlines()
    covered = [line for line in lines if " cov: " in line][-1:]
    print(f"{entry}: {lines[-1] if lines else 'nothing said'}; {' '.join(covered)}", flush=True)
    if ended.returncode:
        print(ended.stdout[-5000:], "\n".join(lines[-60:]), sep="\n")
    return ended.returncode != 0


def fuzz(entry: str, seconds: int, seed: int, corpus: Path) -> None:
    """Never returns: libFuzzer ends the process."""
    atheris = importlib.import_module("atheris")  # not everybody has it, and mypy wants stubs of it
    with atheris.instrument_imports(include=["minserve"]):  # and so not at the top of this file
        from tests.chaos import wire

    def frames(data: bytes) -> None:
        size = data[0] + 1 if data else 1  # of the pieces
        found, _ = wire.read([data[start : start + size] for start in range(1, len(data), size)])
        for frame in found:
            wire.unpack_all(bytes(frame.meta))

    def answers(data: bytes) -> None:
        first = data[0] if data else 0
        wire.lie([data[1:]], first % wire.RANKS, reply_after_all=first > 127)

    options = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", f"-seed={seed}", "-rss_limit_mb=2048"]
    options.append(f"-artifact_prefix={tempfile.gettempdir()}/minserve-fuzz-")
    atheris.Setup([sys.argv[0], *options, str(corpus)], {"frames": frames, "answers": answers}[entry])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
