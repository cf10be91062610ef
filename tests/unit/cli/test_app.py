from collections.abc import Callable

from typer.testing import Result

import minserve

Run = Callable[..., Result]


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"minserve {minserve.__version__}\n"
