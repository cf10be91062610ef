"""`python -m minserve` is the same as the `minserve` command."""

from minserve.cli import main

if __name__ == "__main__":
    main()
