"""The part of TorchServe's `ts` package that handlers import. Ranks find it ahead of any installed one."""
