"""Where older handlers import the streaming function from."""
