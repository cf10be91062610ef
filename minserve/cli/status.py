"""`minserve status`: what a running server serves."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from minserve.cli.ending import fail
from minserve.cli.management import find_management
from minserve.errors import MinServeError

if TYPE_CHECKING:
    from minserve.client import Client

REQUEST_TIMEOUT_S = 5.0
STATUS_EVENTS = 5  # the latest of each model


def status(
    url: Annotated[
        str | None,
        typer.Option(help="Management address, http, https or unix:/path. Default: that of the server that runs here."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON of /models/{model}, with the latest events.")
    ] = False,
) -> None:
    """Show the models, workers and ranks of a running server."""
    from minserve import console

    client = find_management(url)
    try:
        described = [version for name in _model_names(client) for version in _describe(client, name)]
    except MinServeError as error:
        fail(error)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        fail(f"{client.url}: found an answer that is not minserve's: {error!r}")
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        console.print_status(client.url, described)


def _describe(client: Client, name: str) -> list[dict[str, object]]:
    """What management says of each version of a model, with its latest events."""
    versions = _get(client, f"/models/{name}/all")
    assert isinstance(versions, list)
    for version in versions:
        answer = _get(client, f"/models/{name}/{version.get('modelVersion', 'all')}/events?limit={STATUS_EVENTS}")
        assert isinstance(answer, dict)
        version["events"] = answer["events"]
    return versions


def _model_names(client: Client) -> list[str]:
    names: list[str] = []
    token = "0"
    while token:
        page = _get(client, f"/models?next_page_token={token}")
        assert isinstance(page, dict)
        names += [str(model["modelName"]) for model in page["models"]]
        token = page.get("nextPageToken", "")
    return list(dict.fromkeys(names))


def _get(client: Client, path: str) -> object:
    return client.get(path, REQUEST_TIMEOUT_S)
