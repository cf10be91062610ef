"""The part of TorchServe's `ts` package that handlers import. Ranks find it ahead of any installed one."""

__version__ = "0.12.0"  # of the TorchServe whose names these are
