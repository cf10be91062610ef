import signal

import pytest

from minserve.testing import FAULTS
from minserve.testing.faults import find_fault


def test_faults_have_names() -> None:
    assert find_fault("kill").signal == signal.SIGKILL
    assert find_fault("crash").signal == signal.SIGSEGV
    assert find_fault("kill-torchrun").torchrun
    assert {name for name in FAULTS if not find_fault(name).lethal} == {"stop", "resume"}


def test_an_unknown_one_is_told_with_all_that_are_known() -> None:
    with pytest.raises(
        ValueError, match="fault: found 'kil', allowed: kill, terminate, crash, stop, resume, kill-torchrun"
    ):
        find_fault("kil")
