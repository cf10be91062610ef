"""A package that comes with --extra-files."""

TITLE = "in pieces"
