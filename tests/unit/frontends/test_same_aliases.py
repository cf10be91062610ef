"""The tests of one process, on a frontend process and the server behind it."""

from tests.unit.frontend.test_aliases import *  # noqa: F403
