import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

SCHEMA_COPY = Path(__file__).parents[3] / "configs" / "model-config.schema.json"

Run = Callable[..., Result]


def test_the_schema_in_configs_is_what_the_command_prints(run: Run) -> None:
    assert json.loads(run("schema").stdout) == json.loads(SCHEMA_COPY.read_text())
