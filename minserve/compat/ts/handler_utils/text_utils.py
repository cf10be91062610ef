"""Words out of a line of text, as torchtext's functions of these names give them, so that torchtext is not needed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# A quote is dropped, these stand as words of their own, and the rest parts words.
_WORDS = re.compile(r"[.,()!?']")
_SPACES = re.compile(r"<br />|[;:]")


def ngrams_iterator(token_list: Sequence[str], ngrams: int) -> Iterator[str]:
    """The tokens, then all pairs of neighbours, then all triples and so on, joined by a space.

    Args:
        ngrams: the most tokens in one.
    """
    for length in range(1, ngrams + 1):
        for start in range(len(token_list) - length + 1):
            yield " ".join(token_list[start : start + length])


def get_tokenizer(
    tokenizer: str | Callable[[str], list[str]] | None, language: str = "en"
) -> Callable[[str], list[str]]:
    """A function from a line to its tokens.

    Args:
        tokenizer: "basic_english" (lower case, punctuation apart), None (split at spaces) or a function of the caller's own.

    Raises:
        ValueError: it is none of these, or basic_english for another language.
    """
    if tokenizer is None:
        return str.split
    if callable(tokenizer):
        return tokenizer
    if tokenizer != "basic_english" or language != "en":
        raise ValueError(
            f"there is no tokenizer {tokenizer!r} for {language!r}: take basic_english (en), None or a function"
        )
    return _basic_english


def _basic_english(line: str) -> list[str]:
    plain = _SPACES.sub(" ", line.lower().replace('"', ""))
    return _WORDS.sub(r" \g<0> ", plain).split()
