"""The servers that minserve is measured beside. Each of the `*_app.py` runs in an environment of its own."""
