"""Says what a text is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..handler_utils.text_utils import ngrams_iterator
from ..utils.util import PredictionException, map_class_to_label
from .explaining import captum_class
from .text_handler import TextHandler

if TYPE_CHECKING:
    from minserve.rank.context import Context


class TextClassifier(TextHandler):
    """Answers each text with its classes: `{label: probability}`, in the order of the model.

    The model takes token numbers and offsets, as one that begins with an `EmbeddingBag` called `embedding` does.

    Attributes:
        ngrams: most words in an entry of the vocabulary.
    """

    ngrams = 2

    def handle(self, data: list[dict[str, Any]], context: Context) -> Any:
        """Answers the texts of a batch one after the other: each of the steps, and those of derived classes, is for one."""
        return [answer for row in data for answer in super(TextClassifier, self).handle([row], context)]

    def preprocess(self, data: list[dict[str, Any]]) -> tuple[torch.Tensor, list[str]]:
        """Cleans the text of the field `data` or `body`, and looks its words up.

        Returns:
            The numbers of its words and n-grams, and the words.

        Raises:
            PredictionException: with status 400: there is no text, or bytes that are not UTF-8.
        """
        words = self._tokenize(self._clean(_text_of(data[0])))
        numbers = [self.source_vocab[token] for token in ngrams_iterator(words, self.ngrams)]
        return torch.as_tensor(numbers, device=self.device, dtype=torch.long), words

    def inference(self, data: tuple[torch.Tensor, list[str]], *args: Any, **kwargs: Any) -> Any:
        """Runs the model on what `preprocess` gave."""
        numbers, _ = data
        return super().inference(numbers, torch.zeros(1, dtype=torch.long, device=self.device))

    def postprocess(self, data: torch.Tensor) -> list[dict[str, Any]]:
        """Turns the model's logits, of shape (1, classes), into the answer."""
        return map_class_to_label(torch.softmax(data, dim=-1).tolist(), self.mapping)

    def get_insights(
        self, text_preprocess: tuple[torch.Tensor, list[str]], _: Any, target: Any = 0
    ) -> list[dict[str, Any]]:
        """How much the text counts for the class `target`: `[{"importances": …, "words": […]}]`."""
        numbers, words = text_preprocess
        reference = captum_class("TokenReferenceBase")().generate_reference(numbers.shape[0], device=self.device)
        attributions = self.lig.attribute(
            numbers,
            reference.squeeze(0),
            additional_forward_args=(torch.zeros(1, dtype=torch.long, device=self.device),),
            return_convergence_delta=False,
            target=target,
        )
        importances = self.summarize_attributions(attributions).tolist()
        return [{"importances": importances, "words": self.get_word_token(words)}]

    def _clean(self, text: str) -> str:
        text = self._expand_contractions(self._remove_html_tags(text).lower())
        return self._remove_punctuation(self._remove_accented_characters(text))


def _text_of(row: dict[str, Any]) -> str:
    text = row.get("data") or row.get("body")
    if isinstance(text, bytes | bytearray):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise PredictionException(f"the text is not UTF-8: {error}", 400) from None
    if not isinstance(text, str):
        raise PredictionException("there is no text in the request: send it as its body, or as the field data", 400)
    return text
