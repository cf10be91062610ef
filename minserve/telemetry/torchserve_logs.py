"""The logs of `minserve torchserve`: TorchServe's files in TorchServe's formats, for the scripts that tail and grep them.

Every line goes to stdout and ts_log.log; access_log.log, model_log.log, ts_metrics.log and model_metrics.log have their own
kind besides (torchserve.md 3.3; the formats are those of TorchServe's log4j2.xml).
"""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING

from minserve.telemetry.logging import OUTPUT, LogFile, Writer, one_record, to_stdout
from minserve.telemetry.torchserve_workers import WORKERS, name_of

if TYPE_CHECKING:
    from pathlib import Path

    from minserve.telemetry.logging import Sink

SERVER = logging.getLogger("org.pytorch.serve.ModelServer")
ACCESS_LOG = "minserve.access"
MODEL_LOG = OUTPUT
# Those who log tracebacks of handlers, whose authors look into the model's log.
TRACEBACKS = ("minserve.worker.group", "minserve.worker.failures")
TS_METRICS = "ts_metrics"
MODEL_METRICS = "model_metrics"
LEVELS = {"WARNING": "WARN", "CRITICAL": "FATAL"}
NAMES = {ACCESS_LOG: "ACCESS_LOG", TS_METRICS: "TS_METRICS", MODEL_METRICS: "MODEL_METRICS"}


class Logs:
    """What writes: a thread for the files and one for stdout, so that a terminal on hold does not hold up the files."""

    def __init__(self, ts_log: Sink) -> None:
        self.files = Writer(ts_log)
        self.out = Writer(to_stdout)

    def close(self) -> None:
        """Gives what waits a moment to be written."""
        self.files.close()
        self.out.close()


def configure(level: str, log_dir: Path, metrics_dir: Path, max_bytes: int, files: int) -> Logs:
    """Opens the five files and sends every logger to its own.

    Args:
        level: of minserve's loggers.
        log_dir, metrics_dir: made if they are not there.
        max_bytes, files: see `telemetry.logging.configure`.

    Raises:
        OSError: a file cannot be opened.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    metrics_dir.mkdir(parents=True, exist_ok=True)

    def file(directory: Path, name: str) -> Sink:
        return LogFile(directory / f"{name}.log", max_bytes, files).write

    ts_log = file(log_dir, "ts_log")
    logs = Logs(ts_log)
    line = _Line()
    everything = [_Handler(logs.files.log, line), _Handler(logs.out.log, line)]
    logging.basicConfig(level=logging.WARNING, handlers=everything, force=True)
    logging.captureWarnings(True)
    logging.getLogger("minserve").setLevel(level.upper())
    WORKERS.setLevel(logging.DEBUG)
    SERVER.setLevel(logging.INFO)
    model_log = _Handler(functools.partial(logs.files.put, file(log_dir, "model_log")), line)
    logging.getLogger(MODEL_LOG).handlers = [model_log]
    for name in TRACEBACKS:
        logging.getLogger(name).handlers = [model_log]
    for name, directory, file_name, formatter in (
        (ACCESS_LOG, log_dir, "access_log", _Bare()),
        (TS_METRICS, metrics_dir, "ts_metrics", _Bare()),
        (MODEL_METRICS, metrics_dir, "model_metrics", _Bare()),
    ):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [_Handler(functools.partial(logs.files.put, file(directory, file_name)), formatter)]
    return logs


class _Handler(logging.Handler):
    """Formats in the caller's thread and hands the text to a writer."""

    def __init__(self, write: Sink, formatter: logging.Formatter) -> None:
        super().__init__()
        self._write = write
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception as error:  # the message does not fit its arguments
            text = f"{type(error).__name__}: {error} in the log line {record.msg!r} {record.args!r}"
        self._write(text)


class _Bare(logging.Formatter):
    """`2026-11-25T12:54:00,264 - message`."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{_moment(record)} - {record.getMessage()}"


class _Line(logging.Formatter):
    """`2026-11-25T12:54:00,264 [INFO ] W-9000-echo_1.0-stdout MODEL_LOG - message`: level, thread, logger."""

    def format(self, record: logging.LogRecord) -> str:
        level = LEVELS.get(record.levelname, record.levelname)
        if record.name == MODEL_LOG:
            return "\n".join(self._of_a_rank(record, level, line) for line in record.getMessage().split("\n"))
        thread = getattr(record, "worker", "main")
        name = NAMES.get(record.name, record.name)
        text = one_record(super().format(record))  # with the traceback, if there is one
        return f"{_moment(record)} [{level:5}] {thread} {name} - {text}"

    def _of_a_rank(self, record: logging.LogRecord, level: str, line: str) -> str:
        source, _, text = line.partition(" | ")
        worker = name_of(source.partition(" ")[0])
        return f"{_moment(record)} [{level:5}] {worker}-stdout MODEL_LOG - {text}"


def _moment(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(record.created))},{int(record.msecs):03d}"
