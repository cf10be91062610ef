"""Cannot be loaded."""


class Failing:
    """Fails in initialize."""

    def initialize(self, context):
        """Always the same."""
        raise ValueError("these weights are for another model")

    def handle(self, data, context):
        """Never reached."""
        return data
