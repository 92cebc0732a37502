"""Formulas in one spelling: ``\\frac{\\sqrt3}{2}`` is sqrt3/2 is ``\\dfrac{\\sqrt{3}}{2}``.

A spelling, not algebra: sqrt8 is not 2sqrt2 here, and 3+4i is not 4i+3. Libraries that do algebra (sympy's LaTeX
parsers, math-verify) evaluate what a model wrote, which can take for ever, and stop by signals, which only the main
thread gets; this reads each token once. Formulas are short (see answers.value), and deeper nesting than ``_DEPTH`` is
left as it stands.
"""

import re
from collections.abc import Callable

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[A-Za-z]+|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\S", re.DOTALL)
_DEPTH = 16
_FRACTIONS = frozenset(("\\frac", "\\dfrac", "\\tfrac", "\\cfrac"))
_FONTS = frozenset(
    [
        *("\\text", "\\textbf", "\\textit", "\\textrm", "\\mathrm", "\\mathbf", "\\mathit", "\\mathsf"),
        *("\\mathbb", "\\mbox", "\\operatorname", "\\boxed", "\\fbox"),
    ]
)
_NOTHING = frozenset(
    [
        *("\\left", "\\right", "\\big", "\\Big", "\\bigl", "\\bigr", "\\displaystyle", "\\quad", "\\qquad", "\\,"),
        *("\\!", "\\;", "\\:", "\\ ", "\\(", "\\)", "\\[", "\\]", "~", "$", "\\$", "\\limits"),
    ]
)
_SIGNS = {
    "\\infty": "inf",
    "∞": "inf",
    "infinity": "inf",
    "\\pi": "pi",
    "π": "pi",
    "\\theta": "theta",
    "θ": "theta",
    "\\le": "≤",
    "\\leq": "≤",
    "\\ge": "≥",
    "\\geq": "≥",
    "\\ne": "≠",
    "\\neq": "≠",
    "\\pm": "±",
    "\\cup": "∪",
    "\\cap": "∩",
    "\\in": "∈",
    "\\emptyset": "{}",
    "\\varnothing": "{}",
    "∅": "{}",
    "\\{": "{",
    "\\}": "}",
    "\\cdot": "*",
    "\\times": "*",
    "×": "*",
    "·": "*",
    "\\div": "/",
    "÷": "/",
    "−": "-",
    "–": "-",
    "\\%": "%",
    "√": "sqrt",
    "\\lbrace": "{",
    "\\rbrace": "}",
    "\\to": "→",
    "\\rightarrow": "→",
}
_DEGREES = re.compile(r"(?:\^\s?\{?\s?\\circ\s?\}?|°|\\degree|\s?\bdegrees?\b)", re.IGNORECASE)
_UNIT = re.compile(r"(?<=\S)(?:\\[,;: ]|\s)*\\(?:text|mathrm|mbox|textrm)\s?\{[^{}]*\}(?:\s?\^\s?\{?[0-9]\}?)?\s*$")
_MEMBER = re.compile(r"^\s*\$?\s*[A-Za-z]\s*\\in\b")
_ATOM = r"(?:sqrt(?:[0-9.]+|pi|[a-z])|pi|inf|theta|[a-z]|[0-9.]+)"
_LONE = re.compile(rf"(?<![0-9A-Za-z])\(({_ATOM})\)|(?<=[A-Za-z])\(({_ATOM})\)(?![0-9A-Za-z])")
_JOINED = re.compile(r"\*(?=[^0-9.])|(?<=[^0-9.])\*")
_ENDS = {"(": ")]", "[": ")]", "{": "}"}


class _TooDeep(Exception):
    pass


def formula(text: str, read: Callable[[str], str | None]) -> str | None:
    """``text`` in one spelling without white space, or None when it is nested too deeply. ``read`` is for the members
    of a set, a tuple or an interval; sets are sorted."""
    text = _MEMBER.sub("", text)
    text = _UNIT.sub("", _DEGREES.sub("", text).replace("{,}", ""))
    try:
        written = _Reader(_TOKEN.findall(text)).all()
    except _TooDeep:
        return None
    written = _LONE.sub(lambda m: m[1] or m[2], _JOINED.sub("", written)).rstrip(".,;").removeprefix("+")
    return _members(written, read)


class _Reader:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def all(self) -> str:
        parts = []
        while self._at < len(self._tokens):
            parts.append(self._term())
        return "".join(parts)

    def _next(self) -> str:
        token = self._tokens[self._at] if self._at < len(self._tokens) else ""
        self._at += 1
        return token

    def _term(self) -> str:
        word = self._next()
        if word in _NOTHING:
            return ""
        if word in _FRACTIONS:
            return self._fraction()
        if word in ("\\sqrt", "√"):
            degree = self._until("]") if self._peek() == "[" else ""
            return f"{'root' + degree if degree else 'sqrt'}{_bracketed(self._argument())}"
        if word in _FONTS:
            return self._argument()
        if word in ("^", "_"):
            return word + _bracketed(self._argument())
        if word == "{":
            self._at -= 1
            return self._argument()
        if word == "}":
            return ""
        return _SIGNS.get(word, word.removeprefix("\\").casefold())

    def _fraction(self) -> str:
        follows_a_number = self._at > 1 and self._tokens[self._at - 2].isdigit()
        over, below = self._argument(), self._argument()
        if below.startswith("-") and over:
            over, below = over[1:] if over.startswith("-") else f"-{over}", below[1:]
        mixed = " " if follows_a_number and over.isdigit() and below.isdigit() else ""  # 2\frac13 is 2 1/3
        sign, over = ("-", over[1:]) if over.startswith("-") else ("", over)
        return f"{mixed}{sign}{_bracketed(over)}/{_bracketed(below)}"

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _until(self, end: str) -> str:
        self._at += 1
        parts = []
        while (token := self._next()) not in (end, ""):
            parts.append(token)
        return "".join(parts)

    def _argument(self) -> str:
        """A group in braces, or one token, of which a number gives one digit."""
        self._depth += 1
        if self._depth > _DEPTH:
            raise _TooDeep
        if self._peek() != "{":
            said = self._digit() if self._peek()[:1].isdigit() else self._term()
        else:
            self._at += 1
            parts = []
            while self._peek() not in ("}", ""):
                parts.append(self._term())
            self._at += 1
            said = "".join(parts)
        self._depth -= 1
        return said

    def _digit(self) -> str:
        token = self._tokens[self._at]
        if len(token) > 1:
            self._tokens[self._at] = token[1:]
            return token[0]
        return self._next()


def _bracketed(part: str) -> str:
    return part if re.fullmatch(_ATOM, part) else f"({part})"


def _members(written: str, read: Callable[[str], str | None]) -> str:
    """Sets, tuples and intervals member by member."""
    if len(written) < 2 or written[-1] not in _ENDS.get(written[0], ""):
        return written
    members, depth, start = [], 0, 1
    for i, char in enumerate(written):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and i < len(written) - 1:
            return written  # the first bracket closes before the end: (1,2)∪(3,4)
        if char == "," and depth == 1:
            members.append(written[start:i])
            start = i + 1
    members.append(written[start:-1])
    if len(members) == 1 and written[0] == "(":
        return written
    spelt = [read(member) or member for member in members]
    return written[0] + ",".join(sorted(spelt) if written[0] == "{" else spelt) + written[-1]
