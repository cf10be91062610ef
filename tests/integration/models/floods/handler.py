"""Streams as many chunks as the request says, each of 64 KiB, as fast as it may."""


def handle(data, context):
    if data is None:
        return None
    return ([b"x" * 65536] for _ in range(int(data[0]["body"])))
