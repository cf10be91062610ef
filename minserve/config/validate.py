"""From the values of a model-config.yaml to a ModelConfig: unknown keys, misspellings, wrong types and values."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from pydantic import AliasChoices, BaseModel, ValidationError

from minserve.config.keys import LARGEST, MinServeConfig, ModelConfig, TorchrunConfig
from minserve.config.lenient import forgive_problems, forgive_values
from minserve.config.problems import Problem, describe_value
from minserve.config.schema import allowed_values
from minserve.config.yaml import YamlDocument, YamlPath

_SECTIONS: Mapping[str, type[BaseModel]] = {"torchrun": TorchrunConfig, "minserve": MinServeConfig}
# Keys that TorchServe's handlers read; some of them also have a form that is no map.
_AUTHOR_KEYS = frozenset({"handler", "pippy", "deepspeed", "pt2", "micro_batching"})
# `parallelType:` and a section whose keys are all commented out have a plain meaning; any other null is an error.
_MAY_BE_NULL = frozenset({"parallelType", *_SECTIONS})


def validate(
    document: YamlDocument, data: Mapping[str, object], *, lenient: bool = False
) -> tuple[ModelConfig | None, list[Problem]]:
    """Check each key of the file by itself.

    Args:
        lenient: what TorchServe forgives is a warning, see `lenient`.

    Returns:
        The config, None when a value is wrong, and every problem found.
    """
    problems = list(_check_keys(document, (), data, ModelConfig))
    values = _known_values(data, ModelConfig)
    for name, model in _SECTIONS.items():
        section = values.get(name)
        if isinstance(section, Mapping):
            problems += _check_keys(document, (name,), section, model)
            values[name] = _known_values(section, model)
    if lenient:
        problems = forgive_problems(problems)
    while True:
        try:
            return ModelConfig.model_validate(values), problems
        except ValidationError as error:
            wrong = _wrong_values(error, document, data)
            forgiven = forgive_values(values, wrong) if lenient else None
            if forgiven is None:
                return None, [*problems, *wrong.values()]
            problems += forgiven


def _spellings(model: type[BaseModel]) -> dict[str, str]:
    """Return all keys that the model understands, each with the spelling that the schema uses."""
    spellings: dict[str, str] = {}
    for field in model.model_fields.values():
        alias = field.validation_alias
        keys = alias.choices if isinstance(alias, AliasChoices) else [alias]
        spellings.update({str(key): str(keys[0]) for key in keys})
    return spellings


def _known_values(mapping: Mapping[str, object], model: type[BaseModel]) -> dict[str, object]:
    known = _spellings(model)
    return {key: value for key, value in mapping.items() if key in known and value is not None}


def _check_keys(
    document: YamlDocument, path: YamlPath, mapping: Mapping[str, object], model: type[BaseModel]
) -> Iterator[Problem]:
    known = _spellings(model)
    seen: dict[str, str] = {}
    for key, value in mapping.items():
        at = (*path, str(key))
        if key not in known:
            yield from _unknown(document, at, value, known)
            continue
        name = known[key]
        if value is None and key not in _MAY_BE_NULL:
            yield document.problem(at, found="null", allowed=allowed_values(model, name), hint="or leave the key out")
        if name in seen:
            yield document.problem(at, found=f"a second spelling of {seen[name]}", allowed="one of the two")
        seen[name] = key


def _unknown(document: YamlDocument, at: YamlPath, value: object, known: Mapping[str, str]) -> Iterator[Problem]:
    *section, key = (str(part) for part in at)
    if not section and (isinstance(value, Mapping) or key in _AUTHOR_KEYS):
        # The author's, unless it is one of our sections in another spelling.
        meant = next((name for name in _SECTIONS if _squashed(name) == _squashed(key)), None)
        if meant:
            yield document.problem(at, found="an unknown key", allowed=meant, hint=f"did you mean {meant}?")
        return
    by_squashed = {_squashed(name): name for name in known}
    for close in difflib.get_close_matches(_squashed(key), by_squashed, n=1, cutoff=0.8):
        meant = known[by_squashed[close]]
        yield document.problem(at, found="an unknown key", allowed=meant, hint=f"did you mean {meant}?")
        return
    if section:
        found = "an unsupported parameter" if section == ["torchrun"] else "an unknown key"
        allowed, hint = f"one of {', '.join(sorted(set(known.values())))}", "it has no effect"
    else:
        home = next((name for name, model in _SECTIONS.items() if key in _spellings(model)), None)
        found, allowed = "an unknown key", "a key of minserve's or TorchServe's, or a map of your own"
        hint = f"did you mean {home}: {{{key}: ...}}?" if home else "only the handler sees it"
    yield document.problem(at, found=found, allowed=allowed, hint=hint, severity="warning")


def _squashed(key: str) -> str:
    return key.casefold().replace("-", "").replace("_", "")


def _wrong_values(
    error: ValidationError, document: YamlDocument, data: Mapping[str, object]
) -> dict[YamlPath, Problem]:
    by_path: dict[YamlPath, Problem] = {}
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        path, value = _locate(data, detail["loc"])
        # Pydantic reports each choice of a union; what is allowed covers them all.
        allowed = _allowed(path)
        if isinstance(value, int) and value > LARGEST:
            allowed += f" and <= {LARGEST}"
        by_path[path] = document.problem(path, found=describe_value(value), allowed=allowed)
    return by_path


def _locate(data: Mapping[str, object], loc: YamlPath) -> tuple[YamlPath, object]:
    """Follow pydantic's location into the values; it ends in names of union members, which are no keys."""
    path: YamlPath = ()
    value: object = data
    for part in loc:
        if isinstance(value, list) and isinstance(part, int):
            value = value[part]
        elif isinstance(value, Mapping) and part in value:
            value = value.get(part)
        else:
            break
        path = (*path, part)
    return path, value


def _allowed(path: YamlPath) -> str:
    model: type[BaseModel] = ModelConfig
    key = str(path[0])
    if len(path) > 1 and key in _SECTIONS:
        model, key = _SECTIONS[key], str(path[1])
    return allowed_values(model, _spellings(model)[key])
