"""TorchServe's way with pp: rank 0 alone is called, and calls the other ranks itself."""

import os

from ts.utils.util import PredictionException


class Rank0Handler:
    def initialize(self, context):
        self.calls = 0

    def handle(self, data, context):
        assert os.environ["RANK"] == "0"
        self.calls += 1
        if data[0]["body"] == b"refuse":
            raise PredictionException("not today", 422)
        return [f"call {self.calls}"]
