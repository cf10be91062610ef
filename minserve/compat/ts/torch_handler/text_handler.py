"""The base of handlers that take text: its cleaning, its vocabulary and its explanation."""

from __future__ import annotations

import functools
import os
import re
import string
import unicodedata
from abc import ABC
from typing import TYPE_CHECKING, Any

import torch

from ..handler_utils.text_utils import get_tokenizer
from ..utils.util import CLEANUP_REGEX
from .base_handler import BaseHandler
from .contractions import CONTRACTION_MAP
from .explaining import captum_class
from .model_files import load_saved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minserve.rank.context import Context

# The longest first: he'd've is not he'd with something behind it.
CONTRACTIONS_PATTERN = re.compile("|".join(sorted(CONTRACTION_MAP, key=len, reverse=True)), re.IGNORECASE)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TextHandler(BaseHandler, ABC):
    """Loads the vocabulary beside the model, and has the steps by which text is cleaned.

    Attributes:
        source_vocab: from a token to its number: what `source_vocab.pt` in the archive holds.
        tokenizer: from a line to its tokens.
        input_text: for handlers that keep it here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.source_vocab: Any = None
        self.tokenizer = get_tokenizer("basic_english")
        self.input_text: Any = None
        self.initialized = None

    def initialize(self, context: Context) -> None:
        """Loads the model and its vocabulary.

        Raises:
            RuntimeError: there is no vocabulary.
        """
        super().initialize(context)
        self.initialized = False
        self.source_vocab = load_saved(self.manifest["model"].get("sourceVocab") or self.get_source_vocab_path(context))
        self.initialized = True

    @functools.cached_property
    def lig(self) -> Any:
        """Captum's integrated gradients of the model's embedding."""
        return captum_class("LayerIntegratedGradients")(self.model, self.model.embedding)

    def get_source_vocab_path(self, ctx: Context) -> str:
        """The vocabulary's file.

        Raises:
            RuntimeError: it is missing.
        """
        path = os.path.join(str(ctx.system_properties.get("model_dir")), "source_vocab.pt")
        if not os.path.isfile(path):
            raise RuntimeError(f"Missing the source_vocab file: text handlers need their vocabulary as {path}")
        return path

    def get_word_token(self, input_tokens: Sequence[str]) -> list[str]:
        """The tokens without the sign that byte-pair encodings put in place of a space."""
        return [token.replace("\u0120", "") for token in input_tokens]

    def summarize_attributions(self, attributions: torch.Tensor) -> torch.Tensor:
        """Attributions scaled so that they can be compared, in their shape."""
        scaled = torch.softmax(attributions, dim=-1)
        norm: torch.Tensor = torch.linalg.vector_norm(scaled.sum(dim=-1))
        return scaled / norm

    def _expand_contractions(self, text: str) -> str:
        """I'd becomes I would, with the first letter as it was; what is left of apostrophes goes."""

        def expand(match: re.Match[str]) -> str:
            short = match.group()
            long = CONTRACTION_MAP.get(short) or CONTRACTION_MAP[short.lower()]
            return (short[0] if short[0].isalpha() else long[0]) + long[1:]

        return CONTRACTIONS_PATTERN.sub(expand, text).replace("'", "")

    def _remove_accented_characters(self, text: str) -> str:
        return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")

    def _remove_html_tags(self, text: str) -> str:
        return CLEANUP_REGEX.sub("", text)

    def _remove_punctuation(self, text: str) -> str:
        return text.translate(_NO_PUNCTUATION)

    def _remove_puncutation(self, text: str) -> str:  # the name that older handlers call
        return self._remove_punctuation(text)

    def _tokenize(self, text: str) -> list[str]:
        return self.tokenizer(text)
