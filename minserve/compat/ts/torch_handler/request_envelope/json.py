"""TensorFlow Serving's format: `{"instances": […]}` in, `{"predictions": […]}` out."""

from __future__ import annotations

import json
from base64 import b64decode
from itertools import chain, islice
from typing import Any

from ...utils.util import PredictionException
from .base import BaseEnvelope


class JSONEnvelope(BaseEnvelope):
    """The handler gets the instances of all requests as one list, and gives as many answers.

    An instance, or a value in one, that is `{"b64": text}` becomes the bytes that the text stands for.
    """

    def __init__(self, handle_fn: Any) -> None:
        super().__init__(handle_fn)
        self._lengths: list[int] = []

    def parse_input(self, data: Any) -> list[Any]:
        """The instances of all requests.

        Raises:
            PredictionException: with status 400: a request has none.
        """
        instances = [_instances_of(row) for row in data]
        self._lengths = [len(one) for one in instances]
        return list(chain.from_iterable(instances))

    def format_output(self, data: Any) -> list[str]:
        """JSON text for each request, with the answers to its instances."""
        answers = iter(data)
        return [json.dumps({"predictions": list(islice(answers, n))}) for n in self._lengths]


def _instances_of(row: dict[str, Any]) -> list[Any]:
    content = row.get("data") or row.get("body") or row
    if isinstance(content, bytes | bytearray | str):
        try:
            content = json.loads(content)
        except ValueError as error:
            raise PredictionException(f"the request is not JSON: {error}", 400) from None
    instances = content.get("instances") if isinstance(content, dict) else None
    if not isinstance(instances, list):
        raise PredictionException('the request must be JSON like {"instances": [...]}', 400)
    return [_decoded(one) for one in instances]


def _decoded(instance: Any) -> Any:
    if not isinstance(instance, dict):
        return instance
    if instance.keys() == {"b64"}:
        return _bytes(instance["b64"])
    return {key: _bytes(v["b64"]) if isinstance(v, dict) and v.keys() == {"b64"} else v for key, v in instance.items()}


def _bytes(text: Any) -> bytes:
    try:
        return b64decode(text)
    except (ValueError, TypeError) as error:
        raise PredictionException(f"a value of b64 is not base64: {error}", 400) from None
