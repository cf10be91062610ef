"""MAR-INF/MANIFEST.json: what an archive says of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from minserve.config.problems import Problem, describe_value, raise_errors
from minserve.errors import ConfigError

MANIFEST = Path("MAR-INF", "MANIFEST.json")
LARGEST_MANIFEST = 1024 * 1024  # bytes: it goes to every rank
_OBJECT = "a JSON object"
_USUAL_VERSION, _USUAL_RUNTIME = "1.0", "python"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What MANIFEST.json says. None: nothing.

    Attributes:
        handler: `file.py`, `file.py:name`, or the name of a shipped handler.
        envelope: name of a request envelope.
        config_file: file name of the model's YAML.
        requirements_file: file name of a list of packages for pip.
        text: the JSON text, as ranks get it.
    """

    model_name: str | None = None
    version: str = _USUAL_VERSION
    handler: str | None = None
    runtime: str = _USUAL_RUNTIME
    envelope: str | None = None
    config_file: str | None = None
    requirements_file: str | None = None
    text: str = ""


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a model directory or of an extracted archive; None if there is none.

    Raises:
        ConfigError: it cannot be read, is no JSON, or has a value of a wrong type.
    """
    path = directory / MANIFEST
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_MANIFEST + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > LARGEST_MANIFEST:
        raise ConfigError(f"{path}: larger than {LARGEST_MANIFEST} bytes")
    return _parse(path, raw)


def _parse(path: Path, raw: bytes) -> Manifest:
    try:
        text = raw.decode("utf-8-sig")
        # Numbers stay as written: TorchServe takes them where a text is due, and 1.10 is not version 1.1.
        document = json.loads(text, parse_float=str, parse_int=str)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: no JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not in UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    problems: list[Problem] = []

    def wrong(key: str, value: object, allowed: str) -> None:
        problems.append(Problem(str(path), None, key, describe_value(value), allowed))

    if not isinstance(document, dict):
        wrong("", document, _OBJECT)
        raise_errors(problems)
    model = document.get("model")
    if model is None:
        model = {}
    elif not isinstance(model, dict):
        wrong("model", model, _OBJECT)
        model = {}

    def text_of(values: dict[str, object], key: str, prefix: str = "model.") -> str | None:
        value = values.get(key)
        if value is None or (isinstance(value, str) and value.isprintable()):  # JSON can name what no UTF-8 can write
            return value or None
        wrong(prefix + key, value, "a string of printable characters")
        return None

    manifest = Manifest(
        model_name=text_of(model, "modelName"),
        version=text_of(model, "modelVersion") or _USUAL_VERSION,
        handler=text_of(model, "handler"),
        runtime=text_of(document, "runtime", prefix="") or _USUAL_RUNTIME,
        envelope=text_of(model, "envelope"),
        config_file=text_of(model, "configFile"),
        requirements_file=text_of(model, "requirementsFile"),
        text=text,
    )
    raise_errors(problems)
    return manifest
