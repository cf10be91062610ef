"""The server's side of a rank group: starting it, talking to its ranks, watching it, ending it."""
