"""Numbers by value: 1,000 is 1000.0 is 1e3, 1/2 is 0.5, and what stands around a number does not count."""

import re
from collections.abc import Sequence
from fractions import Fraction

from orchestrator.aggregators.extract.latex import without_latex
from orchestrator.aggregators.extract.plain import tail

# A sign that joins two things (2-3, 2024-01-05) or opens a list item ("- 5") is none; a digit after a letter belongs
# to a name. No part can match what its neighbour could, so that scanning is linear.
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    r"(?:(?<![\w.)%])(?P<sign>[-−–+])[£€]?)?(?<![^\W_])"
    r"(?:(?P<units>[0-9]{1,9})\s(?=[0-9]{1,9}\s?/\s?[0-9]))?"
    rf"(?P<mantissa>{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE](?P<e>[-+]?[0-9]{1,4})(?![^\W_]|\.[0-9])|\s?[×x*]\s?10\s?\^\s?(?P<power>[-−]?[0-9]{1,4}))?"
    rf"(?:\s?/\s?(?P<below>(?=0*[1-9]){_WHOLE})(?![\w/]))?"
    r"(?:\s?(?P<percent>%|percent\b|per cent\b)|\s(?P<scale>thousand|million|billion|trillion)\b)?",
    re.IGNORECASE,
)
_UNIT = re.compile(r"\s+(?!pi\b|sqrt|and\b|or\b)[a-zµ°²³/^ .]{2,32}", re.IGNORECASE)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LONG = 40
"""Digits, or powers of ten times ten. A number beyond that is compared as it is written."""


def last_number(text: str) -> str | None:
    """The last number of ``text`` in canonical form ("1000", "-0.5", "1/3", "50%"), or None."""
    last = None
    for match in _NUMBER.finditer(without_latex(tail(text))):
        last = match
    return _canonical(last) if last else None


def first_number(text: str) -> str | None:
    """The first number of ``text``, or None."""
    match = _NUMBER.search(without_latex(text[:1000]))
    return _canonical(match) if match else None


def whole_number(text: str) -> str | None:
    """The number that a short ``text`` is, perhaps with a unit after it ("12 apples"), or None."""
    if len(text) > 100:
        return None
    text = without_latex(text).strip(" \t\n*_`\"'()£€").rstrip(".")
    match = _NUMBER.match(text)
    rest = text[match.end() :] if match else ""
    return _canonical(match) if match and (not rest or _UNIT.fullmatch(rest)) else None


def settle_percents(answers: Sequence[str | None]) -> list[str | None]:
    """``answers`` with "50%" written as the others write it: 50 where somebody says 50, else 0.5 where somebody does.

    Looks at all answers at once, so that their order does not matter; None is an answer that cannot be read.
    """
    others = {a for a in answers if a is not None and not a.endswith("%")}
    return [None if a is None else _settle(a, others) for a in answers]


def _settle(answer: str, others: set[str]) -> str:
    face = answer.removesuffix("%")
    if face == answer or face in others or not (match := _NUMBER.fullmatch(face)):
        return face if face in others else answer
    share = _written(_value(match) / 100)
    return share if share in others else answer


def _canonical(match: re.Match[str]) -> str:
    percent = "%" if match["percent"] else ""
    if match["mantissa"].isdecimal() and match.end("mantissa") == match.end() and not match["units"]:
        digits = match["mantissa"].lstrip("0") or "0"
        return f"-{digits}" if digits != "0" and match["sign"] in ("-", "−", "–") else digits
    if len(match["mantissa"]) > _LONG or abs(_exponent(match)) > 10 * _LONG:
        return match[0].replace(",", "").casefold()
    return _written(_value(match)) + percent


def _exponent(match: re.Match[str]) -> int:
    return int((match["e"] or match["power"] or "0").replace("−", "-")) + _SCALES.get((match["scale"] or "").lower(), 0)


def _value(match: re.Match[str]) -> Fraction:
    value = Fraction(match["mantissa"].replace(",", "")) * Fraction(10) ** _exponent(match)
    below = Fraction((match["below"] or "1")[:_LONG].replace(",", ""))
    value = value / below + int(match["units"] or 0)
    return -value if match["sign"] in ("-", "−", "–") else value


def _written(value: Fraction) -> str:
    """A decimal where it ends, else the fraction."""
    below = value.denominator
    if below == 1:
        return str(value.numerator)
    places = twos = (below & -below).bit_length() - 1
    rest, fives = below >> twos, 0
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{below}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // below).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
