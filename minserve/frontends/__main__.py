"""What the server starts: `python -m minserve.frontends`."""

from __future__ import annotations

from minserve.frontends.process import main

if __name__ == "__main__":
    main()
