"""What the text of an answer shows of its reliability, in numbers that cost microseconds.

Legend: W features.
"""

import math
import re

import numpy as np

from routers.records import Array

WORDS = (
    *("length", "unfinished", "hedging", "sums_right", "sums_wrong", "repeats", "backs_choice", "backs_other"),
    *("figures_used", "figures_left", "whole"),
)
_READ_CHARS = 6000
"""Characters that are read, from the end: where the answer stands."""
_CUE = re.compile(r"\banswer(?: is|:)|####|\\boxed", re.IGNORECASE)
_HEDGE = re.compile(
    r"\b(?:not sure|unclear|cannot|perhaps|possibly|probably|seems?|none of|closest|approximately|unable|sorry"
    r"|assum\w{1,4})\b",
    re.IGNORECASE,
)
_FIGURE = r"-?[0-9][0-9,]{0,15}(?:\.[0-9]{1,12})?"
_SUM = re.compile(rf"({_FIGURE}) ?([-+*/×÷x]) ?\$?({_FIGURE})%? ?= ?(?:<<[^>\n]{{1,80}}>>)?\$?({_FIGURE})")
_NUMBER = re.compile(_FIGURE)
_SPLIT = re.compile(r"[.\n]")


def answer_words(text: str, question: str, choice: str | None = None, others: tuple[str, ...] = ()) -> Array:
    """(W,). ``choice`` is the wording of the option that the answer settled on, ``others`` the rest."""
    body = text[-_READ_CHARS:]
    cue = _CUE.search(body)
    reasoning = body[: cue.start()] if cue else body
    right, wrong = checked_sums(reasoning)
    backs = [_backs(reasoning, choice), max((_backs(reasoning, other) for other in others), default=0.0)]
    return np.array(
        [
            math.log1p(len(text)),
            float(cue is None),
            math.log1p(len(_HEDGE.findall(reasoning))),
            math.log1p(right),
            math.log1p(wrong),
            _repeats(reasoning),
            *backs,
            *_figures_used(reasoning, question[-_READ_CHARS:]),
            float(choice is not None and choice.isdecimal()),
        ],
        np.float32,
    )


def checked_sums(text: str) -> tuple[int, int]:
    """How many of the "a x b = c" in ``text`` hold, to the digits given, and how many do not."""
    right = wrong = 0
    for one, sign, other, result in _SUM.findall(text):
        a, b, c = (float(figure.replace(",", "")) for figure in (one, other, result))
        if sign in "/÷" and b == 0:
            continue
        due = {"+": a + b, "-": a - b}.get(sign, a / b if sign in "/÷" and b else a * b)
        holds = abs(due - c) <= 0.006 * max(1.0, abs(due))
        right, wrong = right + holds, wrong + (not holds)
    return right, wrong


def _figures_used(reasoning: str, question: str) -> tuple[float, float]:
    """How many of the question's figures the reasoning takes up, and whether it leaves one out."""
    given = {f.replace(",", "") for f in _NUMBER.findall(question)}
    if not given:
        return 0.0, 0.0
    used = len(given & {f.replace(",", "") for f in _NUMBER.findall(reasoning)}) / len(given)
    return used, float(used < 1)


def _repeats(text: str) -> float:
    sentences = [s.strip() for s in _SPLIT.split(text) if len(s) > 15]
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0


def _backs(reasoning: str, option: str | None) -> float:
    """Whether the reasoning ends on this option: its number, or its wording, in the last 250 characters."""
    if not option:
        return 0.0
    tail = reasoning[-250:]
    wanted, found = _NUMBER.findall(option), _NUMBER.findall(tail)
    if wanted:
        return float(bool(found) and found[-1].replace(",", "") == wanted[0].replace(",", ""))
    return float(option.strip(" .").lower() in tail.lower())
