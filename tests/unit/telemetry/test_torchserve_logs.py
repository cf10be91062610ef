from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.telemetry import torchserve_logs
from minserve.telemetry.torchserve_logs import ACCESS_LOG, MODEL_LOG, MODEL_METRICS, TRACEBACKS, TS_METRICS, Logs

MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3}"


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    names = ("", "minserve", ACCESS_LOG, MODEL_LOG, TS_METRICS, MODEL_METRICS, *TRACEBACKS)
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).level) for name in names}
    logs = torchserve_logs.configure("info", tmp_path / "logs", tmp_path / "metrics", 0, 1)
    yield logs
    logs.close()
    logging.captureWarnings(False)
    for name, (handlers, level) in before.items():
        logging.getLogger(name).handlers, logging.getLogger(name).level = handlers, level


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_each_kind_of_line_has_its_file_and_ts_log_has_all(
    logs: Logs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("minserve.server").warning("a server's %s", "line")
    logging.getLogger(MODEL_LOG).info("%s | %s", "echo/0 rank 1", "printed | with a bar")
    logging.getLogger(ACCESS_LOG).info('/127.0.0.1:1 "GET /ping HTTP/1.1" 200 3')
    logging.getLogger(TS_METRICS).info("CPUUtilization.Percent:1.0|#Level:Host|#hostname:h,timestamp:1")
    logging.getLogger(MODEL_METRICS).info("PredictionTime.ms:0.1|#ModelName:echo|#hostname:h,timestamp:1")
    logs.close()
    folder, metrics = tmp_path / "logs", tmp_path / "metrics"
    everything = lines(folder / "ts_log.log")
    assert [line.split(" ", 1)[1] for line in everything] == [
        "[WARN ] main minserve.server - a server's line",
        "[INFO ] W-9000-echo_1.0-stdout MODEL_LOG - printed | with a bar",
        '[INFO ] main ACCESS_LOG - /127.0.0.1:1 "GET /ping HTTP/1.1" 200 3',
        "[INFO ] main TS_METRICS - CPUUtilization.Percent:1.0|#Level:Host|#hostname:h,timestamp:1",
        "[INFO ] main MODEL_METRICS - PredictionTime.ms:0.1|#ModelName:echo|#hostname:h,timestamp:1",
    ]
    assert capfd.readouterr().out.splitlines() == everything
    assert lines(folder / "model_log.log") == everything[1:2]
    (access,) = lines(folder / "access_log.log")
    assert re.fullmatch(MOMENT + r' - /127\.0\.0\.1:1 "GET /ping HTTP/1\.1" 200 3', access)
    assert len(lines(metrics / "ts_metrics.log")) == len(lines(metrics / "model_metrics.log")) == 1


def test_a_burst_of_a_rank_is_marked_line_by_line(logs: Logs, tmp_path: Path) -> None:
    logging.getLogger(MODEL_LOG).info("%s", "echo:2.0/1 rank 0 | one\necho:2.0/1 rank 0 | two")
    logs.close()
    assert [line.split("] ")[1] for line in lines(tmp_path / "logs" / "model_log.log")] == [
        "W-9001-echo_2.0-stdout MODEL_LOG - one",
        "W-9001-echo_2.0-stdout MODEL_LOG - two",
    ]


@pytest.mark.parametrize("name", TRACEBACKS)
def test_what_is_told_of_a_handlers_exception_is_in_the_models_log_too(logs: Logs, tmp_path: Path, name: str) -> None:
    logging.getLogger(name).error("echo/0 rank 1 cannot load: ValueError: why\nTraceback (most recent call last):")
    logs.close()
    (one, other) = (lines(tmp_path / "logs" / f"{file}.log") for file in ("model_log", "ts_log"))
    assert one == other
    assert one[1] == "Traceback (most recent call last):"


def test_a_clients_words_in_an_exception_are_no_line_of_the_log(logs: Logs, tmp_path: Path) -> None:
    forged = "2026-11-25T00:00:00,000 [INFO ] main minserve - forged"
    logging.getLogger("minserve").error("echo/0 rank 0: ValueError: no \x1b[2J\r%s\n%s\n\tat", forged, forged)
    logs.close()
    first, second, third = lines(tmp_path / "logs" / "ts_log.log")
    assert first.endswith(rf"ValueError: no \x1b[2J\x0d{forged}")
    assert (second, third) == (f"  {forged}", "\tat")


def test_a_traceback_stands_under_its_line(logs: Logs, tmp_path: Path) -> None:
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("minserve").exception("what")
    logs.close()
    text = (tmp_path / "logs" / "ts_log.log").read_text()
    assert "[ERROR] main minserve - what\nTraceback (most recent call last):\n" in text
    assert text.endswith("ValueError: why\n")


def test_a_message_that_does_not_fit_is_told(logs: Logs, tmp_path: Path) -> None:
    record = logging.LogRecord("minserve", logging.INFO, "", 0, "%d", ("no number",), None)
    for handler in logging.getLogger().handlers:
        if type(handler).__module__ == torchserve_logs.__name__:  # pytest's own would raise
            handler.handle(record)
    logs.close()
    assert "in the log line '%d'" in (tmp_path / "logs" / "ts_log.log").read_text()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        torchserve_logs.configure("info", tmp_path / "file" / "logs", tmp_path, 0, 1)
