"""One process, one socket, and a handler class picked by name."""

import os


class Other:
    def handle(self, data, context):
        raise AssertionError("the wrong class")


class Spread:
    def initialize(self, context):
        self.where = os.getcwd()

    def handle(self, data, context):
        context.set_response_content_type(0, "text/plain")
        return [f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']} in {os.path.basename(self.where)}"]
