"""No collective, so nothing but minserve keeps the ranks in order: each rank writes down the nonces it gets."""

import os
from pathlib import Path


class Nonces:
    def initialize(self, context):
        self.file = (Path(os.environ["NONCES"]) / os.environ["RANK"]).open("a", buffering=1)

    def handle(self, data, context):
        for row in data:
            self.file.write(row["body"] + "\n")
        return [row["body"] for row in data]
