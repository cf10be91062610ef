"""KServe's second protocol, the Open Inference Protocol: `{"inputs": […]}` in, `{"outputs": […]}` out."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...utils.util import PredictionException
from .base import BaseEnvelope
from .kserve import content_of

# Kinds of numbers by the protocol's names. It has fewer than numpy: any other is BYTES.
_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}


class KServev2Envelope(BaseEnvelope):
    """The handler gets the inputs of the one request of the batch, and gives an output for each: `batchSize` must be 1."""

    def parse_input(self, data: Any) -> list[dict[str, Any]]:
        """The first request's inputs, the `data` of each in the shape that it names; of BYTES the first value.

        Raises:
            PredictionException: with status 400: it has none, or one that is not as the protocol says.
        """
        content = content_of(data[0], "inputs")
        inputs = [_shaped(one) for one in content["inputs"]]
        # On the context, where handlers look for them.
        self.context.input_names = [one["name"] for one in inputs]
        if str(content.get("id") or "").strip():
            self.context.input_request_id = content["id"]
        return inputs

    def format_output(self, data: Any) -> list[dict[str, Any]]:
        """One answer with an output for each item that the handler gave, under the name of the input in its place."""
        values = vars(self.context)
        request_id = values.pop("input_request_id", None) or self.context.get_request_id(0)
        names = values.pop("input_names", [])
        model = self.context.manifest.get("model") or {}
        return [
            {
                "id": request_id,
                "model_name": model.get("modelName"),
                "model_version": model.get("modelVersion"),
                "outputs": [
                    _output(item, names[place] if place < len(names) else f"output-{place}")
                    for place, item in enumerate(data)
                ],
            }
        ]


def _shaped(one: Any) -> dict[str, Any]:
    missing = [key for key in ("name", "shape", "datatype", "data") if not isinstance(one, dict) or key not in one]
    if missing:
        raise PredictionException(f"an input has no {', '.join(missing)}", 400)
    try:
        text = one["datatype"] == "BYTES"
        value = one["data"][0] if text else np.array(one["data"]).reshape(tuple(one["shape"])).tolist()
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise PredictionException(f"input {one['name']!r}: {error}", 400) from None
    return {**one, "data": value}


def _output(item: Any, name: str) -> dict[str, Any]:
    flat = np.array(item).flatten()
    datatype = _DATATYPES.get(str(flat.dtype), "BYTES")
    return {"name": name, "datatype": datatype, "data": flat.tolist(), "shape": list(flat.shape)}
