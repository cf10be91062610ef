"""From many requests to one ordered stream of batches. Pure asyncio: no sockets, no processes, a clock handed in."""
