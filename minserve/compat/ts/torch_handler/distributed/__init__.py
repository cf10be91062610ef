"""Bases for handlers that spread a model over ranks with a library of their own."""
