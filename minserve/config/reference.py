"""The part of docs/configuration.md about server options, made from the code: `python -m minserve.config.reference`."""

from __future__ import annotations

import json

from minserve.config.schema import allowed_values
from minserve.config.server import ServerOptions
from minserve.config.torchserve import DEFAULTS, WITHOUT_EFFECT, environment_name


def server_options() -> str:
    """One row for each option, and which of TorchServe's keys are taken and set nothing."""
    lines = ["| option | environment | allowed | meaning |", "|---|---|---|---|"]
    for name, field in ServerOptions.model_fields.items():
        variable = environment_name(name)
        meaning = " ".join((field.description or "").split())
        environment = f"`{variable}`" if variable else ""
        lines.append(f"| `{name}` | {environment} | {allowed_values(ServerOptions, name)} | {meaning} |")
    others = ", ".join(f"`{name}: {json.dumps(value)}`" for name, value in DEFAULTS.items())
    idle = ", ".join(f"`{key}`" for key in sorted(WITHOUT_EFFECT, key=str.lower))
    lines += ["", f"With config.properties these defaults are TorchServe's: {others}.", ""]
    lines.append(f"Taken and without effect, with one line in the log: {idle}.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(server_options())
