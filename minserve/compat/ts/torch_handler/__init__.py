"""The handlers that TorchServe ships, and the bases for handlers of one's own."""
