"""What torchrun starts: one process for each rank. Never imports aiohttp; imports torch only through the handler."""
