"""Never finishes loading on rank 1."""

import os
import time

from minserve import report_progress


class Waits:
    def initialize(self, context):
        if os.environ["RANK"] == "1":
            report_progress("weights", 3, 12)
            time.sleep(3600)

    def handle(self, data, context):
        return data
