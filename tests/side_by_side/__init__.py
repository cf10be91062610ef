"""TorchServe 0.12.0 and minserve on the same archives: the same calls, the answers compared one by one.

`python -m tests.side_by_side --torchserve DIR` (DIR: the bin folder of an environment with torchserve, torch-model-archiver
and torch) runs both and prints where they differ. `--record` keeps TorchServe's answers in recorded.json, against which
tests/integration/test_as_torchserve.py compares minserve in every run of the suite, without Java.
"""
