"""The parameters of management calls, from the query or from a JSON object.

In a query a number that is none counts as not given, as with TorchServe. In JSON it is an error that names the key.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from minserve.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

_LARGEST = 2**31 - 1  # of TorchServe's numbers
_SHOWN = 100  # characters of a wrong value


class Parameters:
    """Values by name; None and what is missing are not given."""

    def __init__(self, values: Mapping[str, object], strict: bool) -> None:
        self._values = values
        self._strict = strict

    @classmethod
    def of_query(cls, query: Mapping[str, str]) -> Parameters:
        """Of several with one name the first."""
        return cls(query, strict=False)

    @classmethod
    def of_json(cls, body: bytes) -> Parameters:
        """The members of an object.

        Raises:
            BadRequest: the body is none.
        """
        try:
            values: object = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from None
        except RecursionError:
            raise BadRequest("the body is nested too deeply") from None
        if not isinstance(values, dict):
            raise BadRequest(f"the body: found {_shown(values)}, allowed: a JSON object")
        return cls(values, strict=True)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self._values.get(name)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(name, "a string")

    def whole(self, name: str, least: int) -> int | None:
        """A whole number; one below `least` stands for none, as TorchServe's -1 does."""
        allowed = f"a whole number up to {_LARGEST}"
        number = self._number(name, allowed)
        if number is None:
            return None
        if not number.is_integer() or number > _LARGEST:
            if self._strict:
                raise self._wrong(name, allowed)
            return None
        return int(number) if number >= least else None

    def seconds(self, name: str) -> float | None:
        """A positive number; another one stands for none."""
        allowed = f"a number of seconds up to {_LARGEST}"
        number = self._number(name, allowed)
        if number is not None and number > _LARGEST:
            if self._strict:
                raise self._wrong(name, allowed)
            return None
        return number if number is not None and number > 0 else None

    def flag(self, name: str, default: bool) -> bool:
        """A truth value."""
        value = self._values.get(name)
        if isinstance(value, bool):
            return value
        if value is None or isinstance(value, str):
            return flag(value, default)
        raise self._wrong(name, "true or false")

    def _number(self, name: str, allowed: str) -> float | None:
        value = self._values.get(name)
        if value is None:
            return None
        try:
            if isinstance(value, (str, int, float)) and not isinstance(value, bool):
                number = float(value)
                if math.isfinite(number):
                    return number
        except (ValueError, OverflowError):
            pass
        if self._strict:
            raise self._wrong(name, allowed)
        return None

    def _wrong(self, name: str, allowed: str) -> BadRequest:
        return BadRequest(f"{name}: found {_shown(self._values[name])}, allowed: {allowed}")


def flag(value: str | None, default: bool) -> bool:
    """A truth value in text: `true` in any case is, all else is not, as with TorchServe."""
    return default if value is None else value.lower() == "true"


def _shown(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
