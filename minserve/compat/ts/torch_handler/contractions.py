"""English contractions and what they stand for."""

from __future__ import annotations

_NEGATED = "are could did do does had has have is may might must need ought should was were would"  # by n't
_IRREGULAR = {
    "ain't": "is not",
    "can't": "cannot",
    "'cause": "because",
    "let's": "let us",
    "ma'am": "madam",
    "o'clock": "of the clock",
    "sha'n't": "shall not",
    "shan't": "shall not",
    "so's": "so as",
    "won't": "will not",
    "y'all": "you all",
    "how'd'y": "how do you",
    "how'd": "how did",
    "where'd": "where did",
}
# What may follow which words: 'd is "did" only after how and where.
_ENDINGS = {
    "'d": ("would", "I i he she it we you they that there y'all"),
    "'ll": ("will", "I i he she it we you they how what who"),
    "'m": ("am", "I i"),
    "'re": ("are", "we you they what y'all"),
    "'s": ("is", "he she it that there how what when where who why"),
    "'ve": (
        "have",
        "I i we you they to so what when where who why will could might must should would y'all",
    ),
}


def _build() -> dict[str, str]:
    simple = {f"{verb}n't": f"{verb} not" for verb in _NEGATED.split()} | _IRREGULAR
    for ending, (verb, words) in _ENDINGS.items():
        for word in words.split():
            simple[word + ending] = f"{_IRREGULAR.get(word, word)} {verb}"
    double = {
        f"{short}'ve": f"{long} have"
        for short, long in simple.items()
        if long.endswith((" not", " would", " will", "cannot")) and short not in ("ain't", "sha'n't")
    }
    return simple | double


CONTRACTION_MAP = _build()
