"""KServe's first protocol: `{"instances": […]}` in, `{"predictions": …}` or `{"explanations": …}` out."""

from __future__ import annotations

import json
from typing import Any

from ...utils.util import PredictionException
from .base import BaseEnvelope


class KServeEnvelope(BaseEnvelope):
    """The handler gets the instances of the one request of the batch: `batchSize` must be 1."""

    def parse_input(self, data: Any) -> Any:
        """The first request's instances.

        Raises:
            PredictionException: with status 400: it has none.
        """
        return content_of(data[0], "instances")["instances"]

    def format_output(self, data: Any) -> list[dict[str, Any]]:
        """One answer with all that the handler gave."""
        return [{"explanations" if self._is_explain() else "predictions": data}]

    def _is_explain(self) -> bool:
        return bool(self.context) and self.context.get_request_header(0, "explain") == "True"


def content_of(row: dict[str, Any], key: str) -> dict[str, Any]:
    """A request's JSON object, which must have this key.

    Raises:
        PredictionException: with status 400: it is something else.
    """
    content = row.get("data") or row.get("body")
    if isinstance(content, bytes | bytearray | str):
        try:
            content = json.loads(content)
        except ValueError as error:
            raise PredictionException(f"the request is not JSON: {error}", 400) from None
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise PredictionException(f'the request must be JSON like {{"{key}": [...]}}', 400)
    return content
