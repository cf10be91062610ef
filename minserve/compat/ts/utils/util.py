"""The exception by which a handler chooses the HTTP status of its failure."""


class PredictionException(Exception):
    """Fails the whole batch with `error_code` as the HTTP status."""

    def __init__(self, message: str, error_code: int = 500) -> None:
        self.message = message
        self.error_code = error_code
        super().__init__(message)

    def __str__(self) -> str:
        return self.message
