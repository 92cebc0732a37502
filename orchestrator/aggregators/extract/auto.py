"""What a request asks for, and the extraction that fits it."""

import re
from dataclasses import dataclass

from experts.types import Request
from orchestrator.aggregators.extract.answers import boxed, number, stated, value
from orchestrator.aggregators.extract.fields import json_field
from orchestrator.aggregators.extract.letters import letter, read_options
from orchestrator.aggregators.extract.plain import plain, tail

_COUNTED = re.compile(
    r"\bhow (?:many|much|far|long|old|fast|tall|high|deep|big|heavy|wide|large|often)\b"
    r"|\b(?:calculate|compute|evaluate|percent|percentage|total|average|sum of|number of|probability)\b"
    r"|\bsolve\b[^.\n]{0,40}[0-9]|[0-9]\s?[-+*/×^=]\s?[0-9(]",
    re.IGNORECASE,
)
_SHORT = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a request asks for: one of ``options``, a number, JSON, or none of these."""

    options: tuple[str, ...] = ()
    number: bool = False
    json: bool = False


def read_request(request: Request) -> Asked:
    question = tail(request.question)
    kind = str((request.response_format or {}).get("type", ""))
    return Asked(
        options=read_options(question), number=_COUNTED.search(question) is not None, json=kind.startswith("json")
    )


def auto(text: str, asked: Asked) -> str | None:
    """The answer that ``text`` gives to what was asked, by the surest sign there is."""
    if asked.json:
        return json_field(text, "answer") or json_field(text)
    if asked.options:
        return letter(text, asked.options)
    if (found := boxed(text)) is not None:
        return found
    if asked.number:
        return number(text)
    says = stated(text) or text
    return value(says) if len(says) <= _SHORT else plain(text)
