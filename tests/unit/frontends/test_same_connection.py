"""The tests of one process, on a frontend process and the server behind it."""

from tests.unit.frontend.test_connection import *  # noqa: F403
from tests.unit.frontend.test_connection import (
    test_a_client_that_leaves_just_behind_its_answer_is_closed,
    test_an_idle_connection_is_closed_after_keepalive_timeout,
)

# These two count the turns of the loop from the answer of a worker, or of /ping, to the end of its request.
del (
    test_a_client_that_leaves_just_behind_its_answer_is_closed,
    test_an_idle_connection_is_closed_after_keepalive_timeout,
)
