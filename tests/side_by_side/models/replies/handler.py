"""Does what a request asks for: every kind of answer and of failure."""

import os

import torch
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import PredictionException


class Replies(BaseHandler):
    """Overrides handle; nothing is loaded."""

    def initialize(self, context):
        """Keeps the context."""
        self.context = context
        self.initialized = True

    def handle(self, data, context):
        """One answer, as the body says."""
        todo = data[0]["body"]
        what = todo["do"]
        if what == "status":
            context.set_response_status(code=todo["code"], phrase=todo.get("phrase", ""), idx=0)
            return ["so be it"]
        if what == "header":
            context.set_response_header(0, "x-from-handler", "a value")
            context.set_response_content_type(0, "text/plain; charset=utf-8")
            return ["typed"]
        if what == "raise":
            raise KeyError("a secret of the handler")
        if what == "prediction":
            raise PredictionException("no such thing", 404)
        if what == "prediction500":
            raise PredictionException("plain")
        if what == "memory":
            raise MemoryError("no more")
        if what == "exit":
            os._exit(3)
        if what == "cuda":
            raise RuntimeError("CUDA out of memory, it says")
        values = {
            "text": ["täxt"],
            "bytes": [b"\x00\x01bytes"],
            "bytearray": [bytearray(b"bytes")],
            "json": [{"b": [1, 2.5, None], "a": "ä"}],
            "number": [42],
            "none": [None],
            "empty": [""],
            "list": [[1, 2, 3]],
            "many": ["one", "two"],
            "no list": "just text",
            "nothing": None,
            "object": [object()],
            "tensor": [torch.zeros(3)],
        }
        return values[what]
