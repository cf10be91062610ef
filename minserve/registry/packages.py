"""The packages that a model brings along: installed by pip, beside its files or into an environment of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minserve.errors import PackagesFailed
from minserve.worker.processes import Watch

_KEPT = 8192  # bytes of a program's output, for the log when it fails

logger = logging.getLogger(__name__)


async def install_requirements(
    model: str, requirements: Path, own: Path, into: Path | None = None, python: Path | None = None
) -> None:
    """Installs what a requirements file lists, with TorchServe's options of pip. Cancelling it ends pip.

    Args:
        model: its name, for messages.
        own: the model's folder in the server's directory. What pip needs meanwhile is in it, so that nothing is left
            whoever is killed.
        into: the folder that the packages are put into, where the handler finds them.
        python: the interpreter of the model's own environment, which gets the packages instead.

    Raises:
        PackagesFailed: pip failed; the log has the end of what it said.
    """
    place = ["-t", str(into)] if into is not None else ["--upgrade-strategy", "only-if-needed"]
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-U", *place, "-r", str(requirements)]
    began = time.monotonic()
    logger.info("%s: installing the packages of %s", model, requirements.name)
    failure = await _run([str(python or sys.executable), "-P", *pip], requirements.parent, own)
    if failure is not None:
        logger.error("%s: the packages of %s cannot be installed: %s", model, requirements.name, failure)
        raise PackagesFailed(f"Custom pip package installation failed for model {model}")
    logger.info("%s: installed the packages in %.1f s", model, time.monotonic() - began)


async def make_venv(model: str, directory: Path) -> Path:
    """Makes a virtual environment in which the server's own packages can be imported, unless it has other versions of them.

    Args:
        directory: a path that is not there yet, in the model's folder in the server's directory.

    Returns:
        Its interpreter.

    Raises:
        PackagesFailed: it cannot be made; the log says why.
    """
    # With the server's pip an environment is there in a tenth of the time.
    pip = ["--without-pip"] if importlib.util.find_spec("pip") is not None else []
    failure = await _run([sys.executable, "-P", "-m", "venv", *pip, str(directory)], directory.parent, directory.parent)
    if failure is None:
        try:
            await asyncio.to_thread(_add_own_packages, directory)
        except OSError as error:
            failure = str(error)
    if failure is not None:
        logger.error("%s: no virtual environment can be made in %s: %s", model, directory, failure)
        raise PackagesFailed(f"Virtual environment creation failed for model {model}")
    return directory / "bin" / "python"


def _add_own_packages(directory: Path) -> None:
    """Puts the server's package folders last on the path of the environment.

    `--system-site-packages` would give those of the Python that the server's own environment was made with. addsitedir, and
    not a bare path, for the sake of the .pth files in them: that is what packages under development are installed as.
    """
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    packages = directory / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    (packages / "_server_packages.pth").write_text("".join(lines))


async def _run(command: list[str], folder: Path, own: Path) -> str | None:
    """Runs a program to its end. None if it went well, else its status and the end of its output.

    Args:
        folder: its current folder. Python looks for modules there (`-P`: not), and a model may have a `queue.py`.
        own: see `install_requirements`. Its name in the environment lets the guardian end it after a server that was killed.
    """
    temporary = own / "tmp"
    try:
        temporary.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=temporary) as output:
            # Not by asyncio: uvloop takes SIGCHLD for that, which is the reaper's.
            process = subprocess.Popen(  # noqa: ASYNC220
                ["env", f"MINSERVE_DIRECTORY={own}", f"TMPDIR={temporary}", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,  # a signal to its group reaches the compilers that it starts, too
            )
            watch = Watch(process.pid, lambda _: None)
            try:
                await watch.ended.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            finally:
                watch.close()
                status = process.wait()
            output.seek(max(0, output.seek(0, os.SEEK_END) - _KEPT))
            said = output.read().decode(errors="replace").strip()
    except OSError as error:
        return str(error)
    finally:
        await asyncio.to_thread(shutil.rmtree, temporary, ignore_errors=True)
    return None if status == 0 else f"status {status}\n{said}"
