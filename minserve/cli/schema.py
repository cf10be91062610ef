"""`minserve schema`: what model-config.yaml may say, for editors."""

from __future__ import annotations

import json

import typer


def schema() -> None:
    """Print the JSON Schema of model-config.yaml, for editors."""
    from minserve.config.model import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
