"""Which versions of which models there are, which of them is a model's default, and which models cannot be served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minserve.errors import Conflict, InvalidModelVersion, ModelNotFound, ModelUnhealthy, ModelVersionNotFound

if TYPE_CHECKING:
    from minserve.errors import ConfigError
    from minserve.registry.served import ServedModel


class Catalogue:
    """Models by name, and each model's versions in the order in which they came. The first is the default at first.

    Args:
        lenient: a broken model is none, as with TorchServe, which knows nothing of what it cannot load.

    Attributes:
        broken: models that the server was told to serve and whose archive or configuration is wrong.
    """

    def __init__(self, lenient: bool) -> None:
        self._lenient = lenient
        self.broken: dict[str, ConfigError] = {}
        self._models: dict[str, dict[str, ServedModel]] = {}
        self._defaults: dict[str, ServedModel] = {}

    def __contains__(self, name: str) -> bool:
        """Whether there is a version of that model."""
        return name in self._models

    def check_free(self, name: str, version: str) -> None:
        """Makes sure that a version can be added.

        Raises:
            Conflict: it is there already.
        """
        if version in self._models.get(name, {}):
            raise Conflict(f"Model version {version} is already registered for model {name}")

    def add(self, served: ServedModel) -> None:
        """Adds a version that is not there yet."""
        name = served.spec.name
        self._models.setdefault(name, {})[served.spec.version] = served
        if name not in self._defaults:
            self.make_default(served)

    def check_removable(self, served: ServedModel) -> None:
        """Makes sure that a version can be removed.

        Raises:
            InvalidModelVersion: it is the default, and there are others.
        """
        name = served.spec.name
        if served.is_default and len(self._models[name]) > 1:
            raise InvalidModelVersion(f"Cannot remove default version for model {name}")

    def remove(self, served: ServedModel) -> None:
        """Removes a version."""
        name = served.spec.name
        served.gone = True
        del self._models[name][served.spec.version]
        if not self._models[name]:
            del self._models[name], self._defaults[name]

    def make_default(self, served: ServedModel) -> None:
        """Makes a version the one that is meant when none is named."""
        for other in self.versions(served.spec.name):
            other.is_default = other is served
        self._defaults[served.spec.name] = served

    def all(self) -> list[ServedModel]:
        """All versions of all models, by name."""
        return [served for name in sorted(self._models) for served in self._models[name].values()]

    def versions(self, name: str) -> list[ServedModel]:
        """All versions of a model; empty where there is none."""
        return list(self._models.get(name, {}).values())

    def find(self, name: str, version: str | None) -> ServedModel:
        """A version; the default one if none is named.

        Raises:
            ModelNotFound, ModelVersionNotFound: there is none.
            ModelUnhealthy: there should be one, and its configuration is wrong.
        """
        versions = self._models.get(name)
        if versions is None:
            if name in self.broken and not self._lenient:
                raise ModelUnhealthy(f'Model "{name}" cannot be served: its configuration is wrong, see the log')
            raise ModelNotFound(f"Model not found: {name}")
        if version is None:
            return self._defaults[name]
        if version not in versions:
            raise ModelVersionNotFound(f"Model version: {version} does not exist for model: {name}")
        return versions[version]
