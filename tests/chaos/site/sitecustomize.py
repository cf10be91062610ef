"""Python runs this before anything else in every process that has this folder on its path, and so in every rank.

It is how a rank is made to connect late or never: what a rank does before its handler is there cannot be told to a handler.
"""

import os

if "MINSERVE_WORKER" in os.environ and "RANK" in os.environ and "CHAOS_CONTROL" in os.environ:
    from tests.chaos.models import orders

    orders.at_start("connect")
