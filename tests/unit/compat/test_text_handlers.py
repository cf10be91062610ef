"""The handler for texts: cleaning, vocabulary, answers; the numbers are TorchServe's unless a name says otherwise."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from minserve.compat.ts.handler_utils.text_utils import get_tokenizer, ngrams_iterator
from minserve.compat.ts.torch_handler.contractions import CONTRACTION_MAP
from minserve.compat.ts.torch_handler.text_classifier import TextClassifier
from minserve.compat.ts.utils.util import PredictionException
from minserve.rank.context import Context
from tests.unit.compat.conftest import MakeContext

VOCABULARY = {"good": 0, "bad": 1, "good bad": 2, "bad good": 3, "good good": 4}


class Counts(torch.nn.Module):
    """As logits of a text: how many of its numbers are 0, and how many are 1."""

    embedding: object = "the embedding"

    def forward(self, numbers: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        assert offsets.tolist() == [0]
        return torch.stack([(numbers == 0).sum(), (numbers == 1).sum()]).float().unsqueeze(0)


@pytest.fixture
def context(archive: Path, make_context: MakeContext) -> Context:
    torch.save(VOCABULARY, archive / "source_vocab.pt")
    return make_context(count=2)


@pytest.fixture
def handler(context: Context) -> TextClassifier:
    made = TextClassifier()
    made.initialize(context)
    made.model = Counts()
    return made


def test_each_text_of_a_batch_is_classified(handler: TextClassifier, context: Context) -> None:
    texts: list[dict[str, Any]] = [
        {"body": bytearray(b"Good <b>BAD</b>!")},
        {"data": "good, good"},
        {"body": "b\u00e1d"},
    ]
    even, good, bad = handler.handle(texts, context)
    assert even == {"cat": 0.5, "dog": 0.5}
    assert good["cat"] == pytest.approx(torch.softmax(torch.tensor([2.0, 0.0]), 0)[0].item())
    assert bad["dog"] == pytest.approx(torch.softmax(torch.tensor([0.0, 1.0]), 0)[1].item())


@pytest.mark.parametrize("row", [{}, {"body": b"\xff"}, {"body": {"a": 1}}])
def test_what_is_no_text_is_refused(handler: TextClassifier, context: Context, row: dict[str, object]) -> None:
    with pytest.raises(PredictionException) as caught:
        handler.handle([row], context)
    assert caught.value.error_code == 400


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("I'd SAY it isn't, y'all", "i would say it is not you all"),
        ("he'd've come 'cause we won't've", "he would have come because we will not have"),
        ("<p>caf\u00e9 &amp; (bar)</p>", "cafe bar"),
        ('cats\' "own"', "cats own"),
    ],
)
def test_a_text_is_cleaned(handler: TextClassifier, text: str, clean: str) -> None:
    assert handler._tokenize(handler._clean(text)) == clean.split()


def test_a_contraction_keeps_its_first_letter(handler: TextClassifier) -> None:
    assert handler._expand_contractions("Can't, CAN'T, 'Cause, I'm") == "Cannot, Cannot, because, I am"
    assert CONTRACTION_MAP["they'll've"] == "they will have"


def test_an_explanation_has_the_words(
    handler: TextClassifier, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    captum: Any = ModuleType("captum.attr")
    asked = []

    def attribute(numbers: torch.Tensor, reference: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append((numbers.tolist(), reference.tolist(), options["target"]))
        return torch.zeros(1, 4)

    captum.LayerIntegratedGradients = lambda model, layer: SimpleNamespace(attribute=attribute, layer=layer)
    captum.TokenReferenceBase = lambda: SimpleNamespace(
        generate_reference=lambda length, device: torch.zeros(1, length, dtype=torch.long)
    )
    monkeypatch.setitem(sys.modules, "captum", ModuleType("captum"))
    monkeypatch.setitem(sys.modules, "captum.attr", captum)
    context = make_context(headers={"explain": "True"})
    (answer,) = handler.handle([{"body": "good bad", "target": "1"}], context)
    assert answer == {"importances": [[0.25] * 4], "words": ["good", "bad"]}
    assert asked == [([0, 1, 2], [0, 0, 0], 1)]
    assert handler.get_word_token(["\u0120a", "b"]) == ["a", "b"]


def test_the_vocabulary_may_be_named_by_the_manifest_and_must_be_there(
    context: Context, archive: Path, make_context: MakeContext
) -> None:
    (archive / "source_vocab.pt").rename(archive / "words.pt")
    with pytest.raises(RuntimeError, match="Missing the source_vocab file"):
        TextClassifier().initialize(context)
    named = TextClassifier()
    named.initialize(make_context({"modelFile": "rows.py", "sourceVocab": str(archive / "words.pt")}))
    assert named.source_vocab == VOCABULARY


def test_tokens_are_those_of_torchtext() -> None:
    words = get_tokenizer("basic_english")
    assert words('It\'s a "Test";yes: (no)!<br />One, two.') == (
        ["it", "'", "s", "a", "test", "yes", "(", "no", ")", "!", "one", ",", "two", "."]
    )
    assert get_tokenizer(None)("A  b") == ["A", "b"]
    assert get_tokenizer(list)("ab") == ["a", "b"]
    assert list(ngrams_iterator(["here", "we", "are"], 2)) == ["here", "we", "are", "here we", "we are"]
    for wrong in (("spacy", "en"), ("basic_english", "de")):
        with pytest.raises(ValueError, match="no tokenizer"):
            get_tokenizer(*wrong)
