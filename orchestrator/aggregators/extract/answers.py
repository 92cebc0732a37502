"""Answers in canonical form, so that equal ones are equal strings."""

import re

from orchestrator.aggregators.extract.formulas import formula
from orchestrator.aggregators.extract.latex import box, without_latex
from orchestrator.aggregators.extract.numbers import first_number, last_number, settle_percents, whole_number
from orchestrator.aggregators.extract.plain import backwards, plain, tail

_LETTER = re.compile(r"[(\[*\s]{0,4}([A-Za-z])[)\].:*\s]{0,4}")
_VARIABLE = re.compile(r"^\s*\$?[A-Za-z]\s?=\s?")
_NAMES = re.compile(r"\b(?:inf|infinity|sqrt|pi)\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{2,}")
_CUE = re.compile(
    r"\banswer(?: to [^.:\n]{1,60})??(?:\s(?:is|would be|should be)\b|[*_\"]{0,3}\s?[:=])|####", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n")
_SHORT = 200
"""Characters of a final answer. Longer ones are texts."""


def value(text: str) -> str | None:
    """A final answer in canonical form: a number by value, a letter, a formula without white space, else plain text.
    None when it is empty."""
    text = text.strip()  # the patterns below count white space
    if len(text) > _SHORT:
        return plain(text)
    text = _VARIABLE.sub("", text)
    cleaned = without_latex(text).strip()
    if (found := whole_number(cleaned)) is not None:
        return found
    if match := _LETTER.fullmatch(cleaned):
        return match[1].upper()
    is_formula = "\\" in text.replace("\\text", "") or any(c in text for c in "^°∞√π") or not _words(cleaned)
    if not is_formula:
        return plain(cleaned)
    written = formula(text, value) or "".join(cleaned.casefold().split()).rstrip(".,;")
    return whole_number(written) or written or None


def _words(text: str) -> bool:
    return _WORD.search(_NAMES.sub("", text)) is not None


def same(a: str, b: str) -> bool:
    """Whether two final answers, extracted or as they were written, mean the same."""
    one, other = settle_percents([value(a) or "", value(b) or ""])
    return a == b or one == other


def stated(text: str) -> str | None:
    """What follows the last "answer is", "Answer:" or "####", up to the end of its sentence, or None."""
    text = tail(text)
    cue = next((match for at in backwards(text, ("answer", "####")) if (match := _CUE.match(text, at))), None)
    if cue is None:
        return None
    said = text[cue.end() : cue.end() + _SHORT].lstrip(" \t\n*:=_\"'")
    return _SENTENCE_END.split(said, 1)[0].strip() or None


def number(text: str) -> str | None:
    """The number that ``text`` settles on: in its last box, after its last "answer is", or simply its last one."""
    inside, says = box(text), stated(text)
    for part in (inside, says and says.rpartition("=")[2]):
        if part and (found := first_number(part)) is not None:
            return found
    return last_number(text)


def boxed(text: str) -> str | None:
    """What the last closed box of ``text`` holds, or None."""
    inside = box(text)
    return None if inside is None else value(inside)
