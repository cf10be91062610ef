"""The tests of one process, on a frontend process and the server behind it."""

from tests.unit.frontend.test_half_closed import *  # noqa: F403
