"""A batch with a status for each request."""


class Batched:
    """Needs nothing of torch."""

    def initialize(self, context):
        """Nothing to load."""

    def handle(self, data, context):
        """The number in a body is its answer's status."""
        for index, parts in enumerate(data):
            code = int(parts["body"])
            context.set_response_status(code=code, phrase="As Asked", idx=index)
        return [f"{int(parts['body'])} in a batch of {len(data)}" for parts in data]
