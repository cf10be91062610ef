"""Each rank writes down the number of every request that it is given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Numbered:
    """The file is `<rank>` in the folder that the model's YAML names."""

    def initialize(self, context: Any) -> None:
        """Opens it."""
        folder = Path(context.model_yaml_config["handler"]["folder"])
        self.file = (folder / os.environ["RANK"]).open("a", buffering=1)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """Answers with the numbers."""
        numbers = [(row.get("data") or row["body"]).decode() for row in data]
        self.file.writelines(f"{number}\n" for number in numbers)
        return numbers
