"""A streamer for `generate` of Hugging Face models that gives the text of a whole batch, step by step."""

from __future__ import annotations

from typing import Any

try:
    from transformers.generation.streamers import BaseStreamer, TextIteratorStreamer
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "ts.handler_utils.hf_batch_streamer needs the package transformers: add it to the model's requirements.txt",
        name=error.name,
    ) from None


class TextIteratorStreamerBatch(BaseStreamer):  # type: ignore[misc]  # the package may be absent
    """Iterating gives, for each step of `generate`, a list with one `{"text": ...}` for each sequence of the batch.

    Args:
        tokenizer: turns ids into text.
        batch_size: sequences in the batch.
        skip_prompt: leave out what `generate` was given.
        timeout: s to wait for the next step; None: without limit.
        decode_kwargs: for the tokenizer's `decode`.
    """

    def __init__(
        self,
        tokenizer: Any,
        batch_size: int,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        self.batch_size = batch_size
        self.streamers = [
            TextIteratorStreamer(tokenizer, skip_prompt, timeout, **decode_kwargs) for _ in range(batch_size)
        ]
        self.streamer_iterators = [iter(streamer) for streamer in self.streamers]

    def put(self, value: Any) -> None:
        """Takes the tokens of a step, a row for each sequence.

        Raises:
            ValueError: there are more or fewer rows than sequences.
        """
        if len(value) != self.batch_size:
            raise ValueError(f"the streamer is for {self.batch_size} sequences and got {len(value)}")
        for index, streamer in enumerate(self.streamers):
            streamer.put(value[index : index + 1])

    def end(self) -> None:
        """`generate` is done."""
        for streamer in self.streamers:
            streamer.end()

    def __iter__(self) -> TextIteratorStreamerBatch:
        return self

    def __next__(self) -> list[dict[str, str]]:
        texts = [next(iterator, None) for iterator in self.streamer_iterators]
        if all(text is None for text in texts):
            raise StopIteration
        return [{"text": text or ""} for text in texts]
