"""HTTP in, HTTP out. Knows aiohttp; knows nothing of ranks."""
