"""Sleeps as long as the request says and tells which process did it."""

import os
import time


def handle(data, context):
    if data is None:
        return None
    time.sleep(float(data[0]["body"]))
    return [str(os.getpid())]
