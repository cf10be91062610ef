"""TorchServe's config.properties and TS_* environment, read as server options (torchserve.md 6).

The rules are TorchServe's: `$$NAME$$` in a value stands for the environment's NAME; with `enable_envvars_config=true` TS_KEY
in the environment goes before file and command line. What it forgives is a warning here, with the value that it would take;
what would stop it, or do something other than what was written, is an error.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import javaproperties
from pydantic import ValidationError

from minserve.config.problems import Problem, describe_value, raise_errors
from minserve.config.schema import allowed_values
from minserve.config.server import ServerOptions
from minserve.config.torchserve import DEFAULTS, FROM_ENVIRONMENT, READ_HERE, WITHOUT_EFFECT, environment_name
from minserve.errors import ConfigError, StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

_VARIABLE = re.compile(r"\$\$([^$]{2,})\$\$")
_WHOLE = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True, slots=True)
class Properties:
    """What was read.

    Attributes:
        properties: the file's, as they stand there, and what the command line says over them; for snapshots.
        warnings: lines for the log.
    """

    options: ServerOptions
    properties: Mapping[str, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Value:
    """A value as text, and where it stands."""

    text: str
    file: str
    line: int | None
    key: str

    def problem(self, allowed: str, hint: str = "") -> Problem:
        shown = "…" if self.key.lower().endswith("keystore_pass") else self.text
        return Problem(self.file, self.line, self.key, describe_value(shown), allowed, hint)


def read_properties(file: Path | None, given: Mapping[str, object], environ: Mapping[str, str]) -> Properties:
    """Options from a properties file, TorchServe's defaults below them and those `given` on the command line above.

    Raises:
        ConfigError: the file cannot be read, or values are wrong. The message lists all of them.
        StartupError: nobody says where the model store is.
    """
    written = _read(file) if file is not None else {}
    values = {key: _resolved(value, environ) for key, value in written.items()}
    reading = _Reading(values)
    if reading.flag("enable_envvars_config"):
        overrides = _overrides(environ, urls=reading.flag("use_env_allowed_urls"))
        values |= overrides
        given = {key: value for key, value in given.items() if key not in overrides}
    options = reading.options(given)
    texts = {key: value.text for key, value in written.items()}
    texts |= {key: _as_text(value) for key, value in given.items() if key not in ("lenient", "access_log")}
    return Properties(options, texts, tuple(reading.warnings))


def _read(file: Path) -> dict[str, _Value]:
    """The values of a file. Of two equal keys the last one counts, as in Java."""
    try:
        content = file.read_bytes()
        values, line = {}, 1
        for element in javaproperties.parse(content):
            if isinstance(element, javaproperties.KeyValue):
                values[element.key] = _Value(element.value, str(file), line, element.key)
            line += len(element.source.splitlines())
    except OSError as error:
        raise ConfigError(
            str(Problem(str(file), None, "", f"a file that cannot be read ({error.strerror})", "one"))
        ) from None
    except javaproperties.InvalidUEscapeError as error:
        raise ConfigError(str(Problem(str(file), None, "", str(error), r"\u and four hexadecimal digits"))) from None
    return values


def _resolved(value: _Value, environ: Mapping[str, str]) -> _Value:
    def look_up(match: re.Match[str]) -> str:
        name = match[1]
        if name not in environ:
            place = value.file if value.line is None else f"{value.file}:{value.line}"
            raise ConfigError(f"{place}: {value.key}: Invalid Environment Variable {name}")
        return environ[name]

    return _Value(_VARIABLE.sub(look_up, value.text), value.file, value.line, value.key)


def _overrides(environ: Mapping[str, str], urls: bool) -> dict[str, _Value]:
    found = {}
    for option in sorted(FROM_ENVIRONMENT):
        name = environment_name(option) or ""
        if name in environ and (option != "allowed_urls" or urls):
            found[option] = _Value(environ[name], "environment", None, name)
    return found


@dataclass
class _Reading:
    """Makes options of texts."""

    values: dict[str, _Value]
    warnings: list[str] = field(default_factory=list)
    _problems: list[Problem] = field(default_factory=list)

    def flag(self, key: str) -> bool:
        return key in self.values and self._boolean(self.values[key])

    def options(self, given: Mapping[str, object]) -> ServerOptions:
        wanted: dict[str, object] = {}
        for key, value in self.values.items():
            if key in ServerOptions.model_fields and key not in given:
                wanted |= self._converted(key, value)
        self._tell_others()
        try:
            options = ServerOptions.model_validate({**DEFAULTS, **wanted, **given})
        except ValidationError as error:
            for key in {str(detail["loc"][0]) for detail in error.errors()}:
                allowed = allowed_values(ServerOptions, key)
                if key in given or key not in self.values:
                    self._problems.append(Problem("command line", None, key, describe_value(given.get(key)), allowed))
                else:
                    self._problems.append(self.values[key].problem(allowed))
        raise_errors(sorted(self._problems, key=lambda problem: (problem.line or 0, problem.key)))
        if "model_store" not in wanted and "model_store" not in given:
            raise StartupError("Missing mandatory parameter --model-store")
        return options

    def _tell_others(self) -> None:
        """One line for all keys that set nothing."""
        others = [value for key, value in self.values.items() if key not in ServerOptions.model_fields]
        idle = [value.key for value in others if value.key in WITHOUT_EFFECT]
        unknown = [_guess(value.key) for value in others if value.key not in WITHOUT_EFFECT | READ_HERE]
        parts = [f"without effect here: {', '.join(sorted(idle))}"] if idle else []
        parts += [f"not known: {', '.join(sorted(unknown))}"] if unknown else []
        if parts:
            self.warnings.append(f"{others[0].file}: keys {'; '.join(parts)}")

    # ── by type ──

    def _converted(self, key: str, value: _Value) -> dict[str, object]:
        """The option, or nothing where its default is meant or the text is wrong."""
        special = _SPECIAL.get(key)
        if special is not None:
            return dict(special(self, key, value))
        text = value.text.strip()
        match _type_of(key):
            case "boolean":
                return {key: self._boolean(value)}
            case "integer" if _WHOLE.fullmatch(text):
                return {key: int(text)}
            case "number" if _is_number(text):
                return {key: float(text)}
            case "integer" | "number":
                self._problems.append(value.problem(allowed_values(ServerOptions, key)))
                return {}
            case "array":
                return {key: [part.strip() for part in text.split(",") if part.strip()]}
            case "object":
                return self._json(key, value)
            case _:
                return {key: text}

    def _boolean(self, value: _Value) -> bool:
        text = value.text.strip().lower()
        if text not in ("true", "false"):
            self.warnings.append(f"{value.problem('true or false', 'taken as false, as by TorchServe')}")
        return text == "true"

    def _json(self, key: str, value: _Value) -> dict[str, object]:
        if not value.text.strip():
            return {}
        try:
            return {key: json.loads(value.text)}
        except (ValueError, RecursionError) as error:
            self._problems.append(value.problem(f"JSON ({error})"))
            return {}

    # ── by key ──

    def _load_models(self, key: str, value: _Value) -> Iterator[tuple[str, object]]:
        names = [part.strip() for part in value.text.split(",") if part.strip()]
        yield key, ["all"] if [name.lower() for name in names] == ["all"] else names

    def _number_or_none(self, key: str, value: _Value) -> Iterator[tuple[str, object]]:
        """0 workers means: as many as minserve thinks right."""
        if value.text.strip() in ("0", ""):
            return
        if _WHOLE.fullmatch(value.text.strip()):
            yield key, int(value.text)
        else:
            self._problems.append(value.problem("an integer >= 0"))

    def _metrics_mode(self, key: str, value: _Value) -> Iterator[tuple[str, object]]:
        text = value.text.strip().lower()
        if text in ("log", "prometheus", "legacy"):
            yield key, text
        else:
            self.warnings.append(
                str(value.problem(allowed_values(ServerOptions, key), "taken as log, as by TorchServe"))
            )

    def _as_it_stands(self, key: str, value: _Value) -> Iterator[tuple[str, object]]:
        yield key, value.text


_SPECIAL: dict[str, Callable[[_Reading, str, _Value], Iterator[tuple[str, object]]]] = {
    "load_models": _Reading._load_models,
    "default_workers_per_model": _Reading._number_or_none,
    "metrics_mode": _Reading._metrics_mode,
    "keystore_pass": _Reading._as_it_stands,
}


def _type_of(key: str) -> object:
    schema = ServerOptions.model_json_schema()["properties"][key]
    return schema.get("type") or schema["anyOf"][0]["type"]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _guess(key: str) -> str:
    close = difflib.get_close_matches(key, ServerOptions.model_fields, n=1)
    return f"{key} (did you mean {close[0]}?)" if close else key


def _as_text(value: object) -> str:
    """An option as it would stand in a properties file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)
