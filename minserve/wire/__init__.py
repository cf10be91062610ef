"""Bytes between the server and a rank: the only package that both halves import."""
