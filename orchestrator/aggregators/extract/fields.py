"""Answers in JSON."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from orchestrator.aggregators.extract.answers import value

_ABSENT = object()


def json_field(text: str, path: str | None = None) -> str | None:
    """What stands at ``path`` ("answer", "result.letter", "steps.0") of the JSON in ``text``, in canonical form.

    Without a path the whole of it. None when there is no JSON in the text, nothing at the path, or null.
    """
    for candidate in _candidates(text):
        try:
            return _canonical(_at(orjson.loads(candidate), path.split(".") if path else []))
        except (orjson.JSONDecodeError, RecursionError):
            continue
    return None


def canonical_json(data: object) -> str:
    """One spelling for equal data: keys sorted, no white space. Raises RecursionError on a thousand levels."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _candidates(text: str) -> Iterator[str]:
    """The text itself; what a fence holds; from the first bracket on, and from the last object's. Never more: each is
    read in full."""
    text = text.strip()
    yield text
    fence = text.rfind("```", 0, max(text.rfind("```"), 0))
    if fence >= 0:
        yield text[fence + 3 : text.rfind("```")].removeprefix("json").strip()
    for opening, closing in (("{", "}"), ("[", "]")):
        end = text.rfind(closing) + 1
        for start in (text.find(opening), text.rfind(opening)):
            if 0 <= start < end:
                yield text[start:end]


def _at(data: Any, path: list[str]) -> Any:
    for key in path:
        if isinstance(data, Mapping):
            data = data.get(key, _ABSENT)
        elif isinstance(data, list) and key.isdecimal() and int(key) < len(data):
            data = data[int(key)]
        else:
            return _ABSENT
    return data


def _canonical(data: Any) -> str | None:
    if data is _ABSENT or data is None:
        return None
    if isinstance(data, str):
        return value(data)
    if isinstance(data, int | float) and not isinstance(data, bool):
        return value(repr(data))
    return canonical_json(data)
