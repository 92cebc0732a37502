"""The option that the answer to a multiple-choice question names."""

import re
from collections.abc import Iterator, Sequence

from orchestrator.aggregators.extract.answers import stated
from orchestrator.aggregators.extract.latex import box
from orchestrator.aggregators.extract.plain import backwards, plain, tail

_FILLERS = "is|are|be|would|should|most|likely|option|choice|letter|text|the|correct|boxed"
_BETWEEN = rf"""(?:[\s:="'“*_$\\{{(\[]|(?:{_FILLERS})\b){{0,24}}+"""
_LETTER = r"(?:([A-Z])(?![\w'’])|(?<=\()([a-z])(?=\)))"
_CUES = ("answer", "choice", "option", "boxed")
_STATED = re.compile(rf"(?i:\b(?:{'|'.join(_CUES)})\b)(?i:{_BETWEEN}){_LETTER}")
_PRAISED = re.compile(r"(?<![\w'’])([A-Z])[)\].*]{0,3} (?:is|seems) (?:the )?(?:correct|right|best|answer)")
_LEADING = re.compile(r"[\s\"'*_#(\[]{0,8}([A-Z])(?:[\"'*_]{0,3}$|[\"'*_]{0,3}[)\].:,\n]|\s-\s)")
_ALONE = re.compile(r"(?<![\w'’.])([A-Z])(?![\w'’])")
# "A dog" and "I think" are no options.
_WORD = re.compile(r"\s+[a-z]")
_MARK = re.compile(r"(?:^|(?<=\s))(?:\(([A-Z])\)|([A-Z])[.):])\s")
_UNKNOWN = "ABCDEFGHIJ"
_SHORT = 80
"""Characters of an answer, or its last line, that says nothing but its choice. In longer ones a capital that stands
alone is mostly a symbol: on MMLU-Pro it was right as often as a guess."""


def letter(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter that ``text`` settles on, among those of ``options`` (A to J where they are not known), or None.

    In this order: in the last box, after the last "answer is" or the like, at the very start, the last one that
    stands alone in a short last line, the one option whose wording a short answer repeats.
    """
    known = {chr(ord("A") + i) for i in range(len(options))} or set(_UNKNOWN)
    text = tail(text).strip()
    if len(text) == 1 and text.upper() in known:
        return text.upper()
    return next((found for found in _candidates(text) if found in known), None) or _worded(text, options)


def read_options(question: str) -> tuple[str, ...]:
    """The options that ``question`` lists, the last list if there are several: "(A) ..." or "A. ..." or "A) ..."."""
    question = tail(question)
    marks = _marks(question)
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    texts = [question[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)] if marks else []
    return (*texts[:-1], texts[-1].split("\n", 1)[0].strip()) if len(texts) > 1 else ()


def read_stem(question: str) -> str:
    """``question`` up to the options that read_options() finds in it."""
    end = tail(question)
    marks = _marks(end)
    return question[: len(question) - len(end) + marks[0].start()].rstrip() if len(marks) > 1 else question


def _marks(question: str) -> list[re.Match[str]]:
    """Those of the last list, from A on."""
    marks: list[re.Match[str]] = []
    for mark in _MARK.finditer(question):
        name = mark[1] or mark[2]
        if name == "A":
            marks = [mark]
        elif marks and ord(name) == ord("A") + len(marks):
            marks.append(mark)
    return marks


def _candidates(text: str) -> Iterator[str]:
    """Letters, the surest first."""
    if (inside := box(text)) is not None:
        yield from reversed(_ALONE.findall(inside))
    for at in backwards(text, _CUES):
        if (found := _STATED.match(text, at)) and not _is_word(found, "I"):
            yield (found[1] or found[2]).upper()
    yield from reversed(_PRAISED.findall(text))
    if leading := _LEADING.match(text):
        yield leading[1]
    last_line = text[text.rfind("\n") + 1 :]
    if len(last_line) <= _SHORT:
        yield from reversed([m[1] for m in _ALONE.finditer(last_line) if not _is_word(m, "AI")])


def _is_word(match: re.Match[str], words: str) -> bool:
    return match[1] is not None and match[1] in words and _WORD.match(match.string, match.end()) is not None


def _worded(text: str, options: Sequence[str]) -> str | None:
    said = stated(text) or text
    said = f" {plain(said) or ''} " if len(said) <= 4 * _SHORT else ""
    hits = {wording: i for i, option in enumerate(options) if (wording := f" {plain(option)} ") in said}
    best = max(hits, key=len, default="")
    return chr(ord("A") + hits[best]) if best and all(wording in best for wording in hits) else None
