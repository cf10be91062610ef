"""`metrics_config`: a YAML file in TorchServe's format that declares metrics in place of the usual ones (torchserve.md 3.2).

    dimensions: [Level, Hostname]          # any list; anchors in it are for the lists below
    ts_metrics:                            # of the server; the last dimension is the host's name
      counter:
        - {name: Requests2XX, unit: Count, dimensions: [Level, Hostname]}
    model_metrics:                         # of handlers; the host's name is added
      gauge:
        - {name: HandlerTime, unit: ms, dimensions: [ModelName, Level]}

Without a file all usual metrics are there; with one only those that it declares.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minserve.config.problems import describe_value, raise_errors
from minserve.config.yaml import read_yaml
from minserve.telemetry.declarations import DEFAULT, KINDS, Declaration, Declarations
from minserve.telemetry.metrics import Metrics
from minserve.telemetry.recorded import LABEL_NAME, METRIC_NAME, OWN_PREFIX, RESERVED_LABELS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from minserve.config.problems import Problem
    from minserve.config.server import ServerOptions
    from minserve.config.yaml import YamlDocument, YamlPath
    from minserve.telemetry.declarations import Kind

SECTIONS = ("ts_metrics", "model_metrics")
_KEYS = ("name", "unit", "dimensions")
_USUAL = {one.name: one for one in DEFAULT.server}


def declared_metrics(file: str, mode: str = "prometheus") -> Declarations:
    """The metrics that the server and its models have.

    Args:
        file: path of the YAML file; "" for the usual metrics.
        mode: metrics_mode. In "log" a name may be any text, else one that Prometheus takes.

    Raises:
        ConfigError: with everything that is wrong with the file.
    """
    if not file:
        return DEFAULT
    return _Reader(read_yaml(Path(file)), anything=mode == "log").read()


def server_metrics(options: ServerOptions) -> Metrics:
    """The metrics of a server with these options.

    Raises:
        ConfigError: metrics_config is wrong.
    """
    declared = declared_metrics(options.metrics_config, options.metrics_mode)
    return Metrics(declared, options.metrics_mode, options.model_metrics_auto_detect)


class _Reader:
    def __init__(self, document: YamlDocument, anything: bool) -> None:
        self._document = document
        self._anything = anything
        self._problems: list[Problem] = list(document.problems)
        self._names: set[str] = set()

    def read(self) -> Declarations:
        data = self._document.data or {}
        for key in data:
            if key not in ("dimensions", *SECTIONS):
                self._wrong((key,), f"an unknown key {key!r}", f"dimensions, {', '.join(SECTIONS)}")
        server, model = (tuple(self._section(section, data.get(section))) for section in SECTIONS)
        raise_errors(self._problems)
        return Declarations(server, model)

    def _section(self, section: str, kinds: object) -> Iterator[Declaration]:
        if kinds is None:
            return
        if not isinstance(kinds, dict):
            self._wrong((section,), describe_value(kinds), f"a map with {', '.join(KINDS)}")
            return
        for given, metrics in kinds.items():
            kind = next((kind for kind in KINDS if kind == given), None)
            if kind is None:
                self._wrong((section, given), f"an unknown kind {given!r}", ", ".join(KINDS))
            elif metrics is not None and not isinstance(metrics, list):
                self._wrong((section, given), describe_value(metrics), "a list of metrics")
            else:
                for index, metric in enumerate(metrics or ()):
                    declaration = self._metric((section, given, index), kind, metric)
                    if declaration is not None:
                        yield declaration

    def _metric(self, path: YamlPath, kind: Kind, metric: object) -> Declaration | None:
        if not isinstance(metric, dict):
            self._wrong(path, describe_value(metric), f"a map with {', '.join(_KEYS)}")
            return None
        before = len(self._problems)
        name, unit, dimensions = (metric.get(key) for key in _KEYS)
        for key in metric.keys() - set(_KEYS):
            self._wrong((*path, key), f"an unknown key {key!r}", ", ".join(_KEYS))
        if not isinstance(name, str) or not self._fit(name):
            allowed = "text" if self._anything else f"letters, digits, _ and :, and it does not begin with {OWN_PREFIX}"
            self._wrong((*path, "name"), describe_value(name), allowed)
        elif name in self._names:
            self._wrong((*path, "name"), f"{name} a second time", "each name once")
        else:
            self._names.add(name)
        if not isinstance(unit, str) or not unit.strip():
            self._wrong((*path, "unit"), describe_value(unit), "text, such as Count or ms")
        labels = self._dimensions((*path, "dimensions"), dimensions)
        if len(self._problems) > before:
            return None
        declaration = Declaration(str(name), kind, str(unit), labels)
        usual = _USUAL.get(declaration.name) if path[0] == SECTIONS[0] else None
        if usual is not None and len(usual.dimensions) != len(labels):
            found = f"{len(labels)} dimensions"
            self._wrong((*path, "dimensions"), found, f"{len(usual.dimensions)}, as in {list(usual.dimensions)}")
        elif path[0] == SECTIONS[0] and not labels:
            self._wrong((*path, "dimensions"), "no dimension", "one at least: the last is the host's name")
        return declaration

    def _dimensions(self, path: YamlPath, dimensions: object) -> tuple[str, ...]:
        if dimensions is None:
            return ()
        if not isinstance(dimensions, list):
            self._wrong(path, describe_value(dimensions), "a list of names")
            return ()
        for index, one in enumerate(dimensions):
            reserved = path[0] == SECTIONS[1] and one in RESERVED_LABELS
            if not isinstance(one, str) or reserved or not (self._anything or LABEL_NAME.fullmatch(one)):
                allowed = "text" if self._anything else "letters, digits and _"
                others = f"; {', '.join(sorted(RESERVED_LABELS))} are the server's" if path[0] == SECTIONS[1] else ""
                self._wrong((*path, index), describe_value(one), allowed + others)
            elif one in dimensions[:index]:
                self._wrong((*path, index), f"{one} a second time", "each name once")
        return tuple(map(str, dimensions))

    def _fit(self, name: str) -> bool:
        if self._anything:
            return bool(name.strip())
        return METRIC_NAME.fullmatch(name) is not None and not name.startswith(OWN_PREFIX)

    def _wrong(self, path: YamlPath, found: str, allowed: str) -> None:
        self._problems.append(self._document.problem(path, found=found, allowed=allowed))
