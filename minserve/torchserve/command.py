"""TorchServe's command line, word for word (torchserve.md 8.1), for scripts that start and stop a server."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import minserve
from minserve import background
from minserve.errors import MinServeError
from minserve.torchserve.pidfile import running_pid
from minserve.torchserve.settings import read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TORCHSERVE_VERSION = "0.12.0"  # whose behaviour this is
START_TIMEOUT_S = 10.0  # then the shell is told that it is well: it goes on in the background
STOP_TIMEOUT_S = 60.0
QUICK_STOP_S = 10.0  # without --foreground; a start right behind it finds the ports free, most often
LAUNCHER = """#!/bin/sh
exec {python} -P -m minserve torchserve "$@"
"""


def main(arguments: Sequence[str], environ: Mapping[str, str], obey_signals: Callable[[], None]) -> int:
    """Runs the command and returns its exit code.

    Args:
        obey_signals: called unless a server runs in this process, which has signals of its own.
    """
    given = parser().parse_args(arguments)
    if given.version or given.stop or given.install_command or not given.foreground:
        obey_signals()
    if given.version:
        print(f"TorchServe Version is {TORCHSERVE_VERSION} (minserve {minserve.__version__})")
        return 0
    if given.install_command is not None:
        return _install(given.install_command)
    if given.stop:
        return _stop(QUICK_STOP_S if not given.foreground else STOP_TIMEOUT_S, tell=given.foreground)
    return _start(given, arguments, environ)


def parser() -> argparse.ArgumentParser:
    """Every flag that TorchServe has."""
    flags = argparse.ArgumentParser(
        prog="torchserve", description="Serves PyTorch models, as TorchServe does", allow_abbrev=False
    )
    what = flags.add_mutually_exclusive_group()
    what.add_argument("-v", "--version", action="store_true", help="print the version")
    what.add_argument("--start", action="store_true", help="start the server; also without this flag")
    what.add_argument("--stop", action="store_true", help="stop the server")
    what.add_argument("--install-command", metavar="DIR", type=Path, help="write an executable `torchserve` there")
    flags.add_argument("--ts-config", metavar="FILE", type=Path, help="config.properties")
    flags.add_argument("--model-store", metavar="DIR", help="folder of the archives")
    flags.add_argument("--workflow-store", metavar="DIR", help="accepted; there are no workflows")
    flags.add_argument("--models", metavar="[NAME=]LOCATION", nargs="+", help="models to load; all")
    flags.add_argument("--log-config", metavar="FILE", type=Path, help="log4j2.xml; accepted, its levels are not read")
    flags.add_argument("--cpp-log-config", metavar="FILE", type=Path, help="accepted; there is no C++ backend")
    flags.add_argument("--foreground", action="store_true", help="stay; with --stop: wait until it has ended")
    flags.add_argument(
        "--no-config-snapshots", "--ncs", dest="no_snapshots", action="store_true", help="keep and read no snapshots"
    )
    flags.add_argument("--plugins-path", "--ppath", metavar="PATH", help="accepted; there are no Java plugins")
    flags.add_argument("--disable-token-auth", "--dt", dest="no_tokens", action="store_true", help="ask for no token")
    flags.add_argument("--enable-model-api", action="store_true", help="let models be registered while it runs")
    return flags


# ── stop ──


def _stop(timeout: float, tell: bool) -> int:
    """Ends the server that the pid file names. Without one that is no error, as with TorchServe."""
    pid = running_pid()
    if pid is None:
        print("TorchServe is not currently running.")
        return 0
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError:
        print(f"TorchServe (pid {pid}) is another user's; it cannot be stopped from here.", file=sys.stderr)
        return 1
    except ProcessLookupError:
        pass  # it has just ended
    deadline = time.monotonic() + timeout
    while running_pid() == pid and time.monotonic() < deadline:
        time.sleep(0.05)
    if tell and running_pid() == pid:
        print("Stopping TorchServe took too long.")
        return 0
    print("TorchServe has stopped.")
    return 0


# ── start ──


def _start(given: argparse.Namespace, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    if running_pid() not in (None, os.getpid()):
        print("TorchServe is already running, please use torchserve --stop to stop TorchServe.")
        return 1
    try:
        settings = read_settings(given, environ)
    except MinServeError as error:
        print(error, file=sys.stderr)
        return 1
    if given.foreground:
        from minserve.torchserve.serving import serve

        return serve(settings, environ)
    return _in_background(arguments, environ)


def _in_background(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Starts the same command again, in the background, and waits until it listens, or has said why it does not."""
    process = background.start(["torchserve", "--foreground", *arguments])
    if background.wait(process, environ, START_TIMEOUT_S) is None and process.poll() is not None:
        return process.returncode or 1
    return 0


# ── the executable ──


def _install(folder: Path) -> int:
    """Writes an executable `torchserve` that is this command. Only where it was asked for: a real one must not be hidden."""
    file = folder / "torchserve"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(file) and b" -m minserve torchserve " not in file.read_bytes():
            print(f"{file}: is there already, and is not minserve's; choose another folder", file=sys.stderr)
            return 1
        file.write_text(LAUNCHER.format(python=shlex.quote(sys.executable)))
        file.chmod(0o755)
    except OSError as error:
        print(f"{file}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{file} runs minserve; put {folder} on the PATH")
    return 0
