"""TensorFlow Serving's format: `{"instances": […]}` in, `{"predictions": […]}` out."""

from __future__ import annotations

import json
import logging
from base64 import b64decode
from itertools import islice
from typing import Any

from minserve.handlers.replies import bad_request

from ...utils.util import PredictionException
from .base import BaseEnvelope

logger = logging.getLogger(__name__)


class JSONEnvelope(BaseEnvelope):
    """The handler gets the instances of all requests as one list, and gives as many answers.

    An instance, or a value in one, that is `{"b64": text}` becomes the bytes that the text stands for. A request that is
    of no such format gets a 400; the others of its batch are answered.
    """

    def __init__(self, handle_fn: Any) -> None:
        super().__init__(handle_fn)
        self._instances: list[list[Any] | PredictionException] = []

    def parse_input(self, data: Any) -> list[Any]:
        """The instances of all requests.

        Raises:
            PredictionException: with status 400: no request has any.
        """
        self._instances = [_read(row) for row in data]
        refused = [one for one in self._instances if isinstance(one, PredictionException)]
        if len(refused) == len(self._instances):
            raise refused[0]
        return [instance for one in self._instances if isinstance(one, list) for instance in one]

    def format_output(self, data: Any) -> list[Any]:
        """JSON text for each request, with the answers to its instances."""
        answers, lengths = list(data), [len(one) for one in self._instances if isinstance(one, list)]
        if len(answers) != sum(lengths) and len(lengths) > 1:
            # Whose is missing cannot be told. No exception, for on the other ranks the handler may return what it likes.
            logger.error("the handler gave %d answers to %d instances", len(answers), sum(lengths))
            return []
        rest = iter(answers)
        return [
            json.dumps({"predictions": list(islice(rest, len(one)))})
            if isinstance(one, list)
            else bad_request(self.context, index, str(one))
            for index, one in enumerate(self._instances)
        ]


def _read(row: dict[str, Any]) -> list[Any] | PredictionException:
    try:
        return _instances_of(row)
    except PredictionException as error:
        return error


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
