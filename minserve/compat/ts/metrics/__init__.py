"""Metrics of handlers, under TorchServe's names."""
