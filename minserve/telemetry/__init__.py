"""How the server tells what it does."""
