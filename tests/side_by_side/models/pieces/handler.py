"""A handler in several files, as a function with a service of the module's: how the oldest archives are."""

import json
import logging
import os
from pathlib import Path

from parts import TITLE
from parts.tables import table

logger = logging.getLogger(__name__)


class Service:
    """Told of the context once."""

    def __init__(self):
        self.initialized = False

    def initialize(self, context):
        """Remembers what it is given."""
        logger.info("the service is set up in %s", "its model's folder" if os.path.exists("words.txt") else os.getcwd())
        self.manifest = context.manifest
        self.initialized = True

    def answer(self, row, context):
        """What the archive's files and the context say."""
        text = row.get("data") or row.get("body")
        properties = context.system_properties
        return {
            "asked": text.decode() if isinstance(text, (bytes, bytearray)) else text,
            "title": TITLE,
            "table": table(),
            "words": [
                Path("words.txt").read_text().strip(),
                (Path(__file__).parent / "words.txt").read_text().strip(),
                (Path(properties.get("model_dir")) / "words.txt").read_text().strip(),
            ],
            "model": self.manifest["model"],
            "runtime": self.manifest["runtime"],
            "yaml": context.model_yaml_config,
            "batch_size": properties.get("batch_size"),
            "limit": properties.get("limit_max_image_pixels"),
            "file": Path(__file__).name,
            "module": __name__,
        }


_service = Service()


def handle(data, context):
    """Called without data first."""
    if not _service.initialized:
        _service.initialize(context)
    if data is None:
        return None
    for index, _ in enumerate(data):
        context.set_response_content_type(index, "application/json")
        context.set_response_header(index, "x-from-handler", "pieces")
    return [json.dumps(_service.answer(row, context), default=str) for row in data]
