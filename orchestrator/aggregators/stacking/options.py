"""What a list of options gives away before anybody has answered.

Wrong options are written by somebody, and that shows: in their length, their numbers, their wording beside the others.
All traits are relative to the other options of the same question, so that a model of them says nothing of its subject.

Legend: O options, T traits.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from routers.records import Array

TRAITS = (
    *("place", "length", "longer_than", "words", "likeness", "nearest", "shared_words", "asked_words"),
    *("number_rank", "number_middle", "number_size", "numeric", "capital", "full_stop", "decimals", "decimals_usual"),
    *("decimals_more", "commas", "brackets", "refusal", "foreign", "double_space", "first", "last"),
)
_WORD = re.compile(r"[a-z]+|[0-9]+(?:\.[0-9]+)?")
_NUMBER = re.compile(r"-?[0-9][0-9,]{0,30}(?:\.[0-9]{1,30})?")
_DECIMALS = re.compile(r"\.([0-9]{1,30})")
_REFUSAL = re.compile(r"\b(?:none of|all of|both|cannot|neither|not enough|not)\b", re.IGNORECASE)
_READ_CHARS = 2000
"""Characters of an option that are read."""


def option_traits(options: Sequence[str], question: str) -> Array:
    """(O, T); a row says how an option stands out among its neighbours."""
    texts = [option[:_READ_CHARS] for option in options]
    words = [set(_WORD.findall(text.lower())) for text in texts]
    asked = set(_WORD.findall(question[: 4 * _READ_CHARS].lower()))
    columns = [*_wording(texts, words, asked), *_numbers(texts), *_marks(texts)]
    return np.clip(np.nan_to_num(np.array(columns, np.float32).T), -4, 4)


def _wording(texts: Sequence[str], words: Sequence[set[str]], asked: set[str]) -> list[Array]:
    count = len(texts)
    lengths = np.array([len(text) for text in texts], np.float64)
    sizes = np.array([len(w) for w in words], np.float64)
    used = Counter(word for own in words for word in own)
    alike = np.array([[len(a & b) / max(1, len(a | b)) for b in words] for a in words]) - np.eye(count)
    return [
        np.arange(count) / max(1, count - 1) - 0.5,
        np.log((lengths + 1) / (lengths.mean() + 1)),
        np.array([(lengths < own).mean() - (lengths > own).mean() for own in lengths]),
        np.log((sizes + 1) / (sizes.mean() + 1)),
        4 * (alike.mean(axis=1) - alike.mean()),
        2 * (alike.max(axis=1) - alike.max(axis=1).mean()),
        _centred([sum(used[w] for w in own) / max(1, len(own)) / count for own in words]) * 3,
        _centred([len(own & asked) / max(1, len(own)) for own in words]) * 3,
    ]


def _numbers(texts: Sequence[str]) -> list[Array]:
    found = [_NUMBER.search(text) for text in texts]
    values = np.array([math.nan if m is None else float(m[0].replace(",", "")) for m in found])
    known = np.isfinite(values)
    rank = np.array([(values[known] < own).mean() if known.any() else 0.0 for own in values]) - 0.5
    size = np.log10(np.abs(values) + 1e-9)
    size = size - (np.median(size[known]) if known.any() else 0.0)
    digits = np.array([len(m[1]) if (m := _DECIMALS.search(text)) else 0 for text in texts], np.float64)
    usual = Counter(digits.tolist())
    return [
        np.where(known, rank, 0.0) * 2,
        np.where(known, 0.25 - rank**2, 0.0) * 8,
        np.where(known, size, 0.0),
        np.where(known, known.mean(), known.mean() - 1),
        _centred([text[:1].isupper() for text in texts]) * 2,
        _centred([text.rstrip().endswith(".") for text in texts]) * 2,
        np.minimum(digits, 4) / 2,
        np.array([usual[own] / len(texts) for own in digits.tolist()]) * 2,
        digits - digits.mean(),
    ]


def _marks(texts: Sequence[str]) -> list[Array]:
    count = len(texts)
    return [
        _centred([text.count(",") for text in texts]),
        _centred([text.count("(") for text in texts]),
        np.array([_REFUSAL.search(text) is not None for text in texts], np.float64),
        _centred([not text.isascii() for text in texts]) * 2,
        _centred(["  " in text for text in texts]) * 2,
        np.arange(count) == 0,
        np.arange(count) == count - 1,
    ]


def _centred(values: Sequence[float]) -> Array:
    array = np.array(values, np.float64)
    centred: Array = array - array.mean()
    return centred
