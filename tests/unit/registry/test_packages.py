import asyncio
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minserve.errors import PackagesFailed
from minserve.registry.packages import install_requirements, make_venv


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    """Asks for a package that lies beside it, and for nothing from elsewhere."""
    information = "tiny_demo-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "tiny_demo-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_demo.py", "ANSWER = 42\n")
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    file = tmp_path / "requirements.txt"
    file.write_text(f"--no-index\n--find-links {tmp_path}\ntiny-demo\n")
    return file


@pytest.fixture
def impossible(tmp_path: Path) -> Path:
    file = tmp_path / "requirements.txt"
    file.write_text("--no-index\nno-such-package==7\n")
    return file


def answer(python: Path | str, code: str, folder: Path) -> str:
    return subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


# pip takes a second, so these run on one kind of loop only.


def test_packages_are_put_beside_the_models_files(requirements: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "pip.py").write_text("raise SystemExit('a module of the model')")
    asyncio.run(install_requirements("m", requirements, tmp_path, into=tmp_path / "model"))
    assert answer(sys.executable, "import tiny_demo; print(tiny_demo.ANSWER)", tmp_path / "model") == "42"


def test_an_environment_of_its_own_has_the_packages_and_sees_the_servers(requirements: Path, tmp_path: Path) -> None:
    python = asyncio.run(make_venv("m", tmp_path / "venv"))
    asyncio.run(install_requirements("m", requirements, tmp_path, python=python))
    code = "import tiny_demo, msgspec, minserve, sys; print(tiny_demo.__file__, msgspec.__file__, sys.prefix)"
    tiny, msgspec, prefix = answer(python, code, tmp_path).split()
    assert Path(tiny).is_relative_to(tmp_path / "venv")
    assert Path(msgspec).is_relative_to(sys.prefix)
    assert prefix == str(tmp_path / "venv")


def test_what_pip_said_is_in_the_log_and_a_short_text_for_the_client(
    impossible: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PackagesFailed) as raised:
        asyncio.run(install_requirements("m", impossible, tmp_path, into=tmp_path))
    assert str(raised.value) == "Custom pip package installation failed for model m"
    assert (raised.value.status, raised.value.type_name) == (400, "ModelException")
    assert "no-such-package==7" in caplog.text


@pytest.mark.asyncio
async def test_an_environment_that_cannot_be_made_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PackagesFailed, match="Virtual environment creation failed for model m"):
        await make_venv("m", tmp_path / "file")
    assert "no virtual environment can be made" in caplog.text


@pytest.mark.asyncio
async def test_cancelling_ends_pip_and_what_it_started_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    pipe, own = tmp_path / "pipe", tmp_path / "x1"
    own.mkdir()
    os.mkfifo(pipe)
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\nmktemp\nsh -c 'echo $MINSERVE_DIRECTORY; exec sleep 1000' > {pipe} &\nwait\n")
    slow.chmod(0o700)
    task = asyncio.create_task(install_requirements("m", tmp_path / "requirements.txt", own, python=slow))
    reader = await asyncio.to_thread(os.open, pipe, os.O_RDONLY)
    try:
        assert await asyncio.to_thread(os.read, reader, 100) == f"{own}\n".encode(), "by which the guardian knows it"
        assert len(list((own / "tmp").iterdir())) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(os.read, reader, 1) == b""  # nobody holds its other end any more
        assert not list(own.iterdir())
    finally:
        os.close(reader)


@pytest.mark.asyncio
async def test_the_end_of_other_children_is_still_told_afterwards(tmp_path: Path) -> None:
    """The reaper hears SIGCHLD, of which an event loop that runs programs makes its own."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    quick = tmp_path / "python"
    quick.write_text("#!/bin/sh\n")
    quick.chmod(0o700)
    before = signal.signal(signal.SIGCHLD, lambda *_: loop.call_soon_threadsafe(told.set))
    try:
        await install_requirements("m", tmp_path / "requirements.txt", tmp_path, python=quick)
        told.clear()
        await asyncio.to_thread(subprocess.run, ["true"], check=True)
        await asyncio.wait_for(told.wait(), 10)
    finally:
        signal.signal(signal.SIGCHLD, before)
