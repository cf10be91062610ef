from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

Run = Callable[..., Result]


def test_a_recording_that_is_there_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recording.1").write_text("precious")
    result = run("record", "m", tmp_path / "recording", "--url", "http://127.0.0.1:1")
    assert (result.exit_code, result.stderr) == (
        1,
        f"minserve: {tmp_path / 'recording.1'} is there already; remove it, or choose another name\n",
    )


def test_recording_without_a_server_leaves_no_file(run: Run, tmp_path: Path) -> None:
    result = run("record", "m", tmp_path / "recording", "--url", "http://127.0.0.1:1")
    assert (result.exit_code, result.stderr) == (1, "minserve: http://127.0.0.1:1: Connection refused\n")
    assert list(tmp_path.iterdir()) == []
