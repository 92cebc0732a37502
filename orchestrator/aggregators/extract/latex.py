"""LaTeX as mathematics models write it: the last box, and formulas that can be compared."""

import re

from orchestrator.aggregators.extract.plain import tail

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOXES = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
_TRIES = 4
"""Boxes looked at from the end; those never closed (an answer that was cut off) are passed over."""

_FRACTION = re.compile(r"\\[dt]?frac(?:\s?\{(-?[0-9]{1,18})\}\s?\{([0-9]{1,18})\}|\s?([0-9])\s?([0-9]))")
_MARKS = (
    *(("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\;", " "), ("\\ ", " "), ("\\%", "%"), ("\\times", "×")),
    *(("\\cdot", "×"), ("\\text", ""), ("\\mathrm", ""), ("\\mathbf", ""), ("\\left", ""), ("\\right", "")),
    *(("\\dfrac", "frac"), ("\\tfrac", "frac"), ("\\(", ""), ("\\)", ""), ("\\", ""), ("$", ""), ("{", ""), ("}", "")),
)


def box(text: str) -> str | None:
    """What the last closed box of ``text`` holds, as it stands, or None."""
    text = tail(text)
    starts = [match.end() for match in _BOXES.finditer(text)] if "\\" in text else []
    for start in reversed(starts[-_TRIES:]):
        end = _closing(text, start)
        if end is not None:
            return text[start:end]
    return None


def without_latex(text: str) -> str:
    """``text`` with LaTeX's simple fractions as a/b and without its other marks."""
    if "\\" in text:
        text = _FRACTION.sub(_as_ratio, text)
    elif "$" not in text:
        return text
    for mark, meaning in _MARKS:
        text = text.replace(mark, meaning)
    return text


def _closing(text: str, start: int) -> int | None:
    """Where the brace opened just before ``start`` is closed."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _as_ratio(match: re.Match[str]) -> str:
    over, below = match[1] or match[3], match[2] or match[4]
    mixed = match.start() > 0 and match.string[match.start() - 1].isdigit()
    return f"{' ' if mixed else ''}{over}/{below}"
