from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from minserve.wire.messages import Part, RequestMeta
from minserve.wire.recording import MAGIC, AnyRecord, Header, Sent, encode

Run = Callable[..., Result]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """One batch of one request, of a worker of two ranks."""
    path = tmp_path / "recording"
    meta = RequestMeta("id", (), (Part("body", "", 2),))
    records: list[AnyRecord] = [
        Header("0.1.0", "m", "1.0", "m/0", 2, 4, False, 1.0),
        Sent("m-0-a", 7, 1.0, (meta,), None),
    ]
    path.write_bytes(MAGIC + b"".join(map(encode, records)))
    return path


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--seq", "one"), "seq: found 'one', allowed: A:B, A:, :B or A, with numbers of batches"),
        (("--seq", "8:"), "seq: found no batch of that range in m-0-a, allowed: batches 7 to 7"),
        (("--nproc", "0"), "nproc: found 0, allowed: an integer >= 1"),
    ],
)
def test_what_cannot_be_played_is_told_before_anything_starts(
    run: Run, store: Path, recording: Path, tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    result = run("replay", recording, store / "m", *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"minserve: {told}"
    assert not (tmp_path / "loaded").exists()


def test_a_replay_of_no_recording_or_into_no_model_is_told(run: Run, store: Path, recording: Path) -> None:
    result = run("replay", store / "m" / "handler.py", store / "m")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "not a recording of minserve" in result.stderr
    result = run("replay", recording, store / "none")
    assert result.exit_code == 1
    assert "no such directory" in result.stderr
