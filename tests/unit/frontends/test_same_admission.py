"""The tests of one process, on a frontend process and the server behind it."""

from tests.unit.frontend.test_admission import *  # noqa: F403
