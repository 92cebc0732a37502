"""A body that is not what it should be, explained in one sentence: where, what, and the nearest right word."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from experts.errors import BadRequest
from orchestrator.config import nearest

MANY = 1000
WORD = 64
"""Characters of a caller's own word that are looked at: finding the nearest known key costs its square."""


def explain_invalid(exc: ValidationError, body: type[BaseModel]) -> BadRequest:
    """The mistake of ``exc`` that tells most. ``body`` is the model that refused."""
    if exc.error_count() > MANY:
        return BadRequest(f"The body has {exc.error_count()} mistakes; /docs shows what it should be.")
    error = min(exc.errors(include_url=False, include_input=False), key=_rank)
    path = list(_path(error, body))
    place = ".".join(path)[:200]
    if error["type"] == "json_invalid":
        return BadRequest(f"The body is not JSON: {error['ctx']['error']}.")
    if error["type"] == "extra_forbidden":
        known = _keys_under(body).get(_without_indexes(path[:-1]), ())
        return BadRequest(f"Unknown key '{place}'{nearest(path[-1][:WORD], known)}", param=place)
    return BadRequest(f"{place or 'body'}: {error['msg'].removeprefix('Value error, ')}.", param=place or None)


def _rank(error: Any) -> tuple[int, int]:
    """Lowest first: a wrong tag explains the unknown keys beside it; of what a union's branches say, the innermost,
    and last that it is no text or no list at all."""
    if error["type"] == "literal_error" and error["loc"][-1] == "type":
        return 0, 0
    kinds = {"extra_forbidden": 1, "string_type": 3, "list_type": 4}
    return kinds.get(error["type"], 2), -len(error["loc"])


def _path(error: Any, body: type[BaseModel]) -> Iterator[str]:
    """Where, less the branches of unions that pydantic names too ("content.list[TextPart].0")."""
    words = {word for keys in _keys_under(body).values() for word in keys}
    if error["type"] == "extra_forbidden":
        words.add(error["loc"][-1])
    return (str(part) for part in error["loc"] if isinstance(part, int) or part in words)


def _without_indexes(path: Sequence[str]) -> str:
    return ".".join(part for part in path if not part.isdecimal())


@cache
def _keys_under(model: type[BaseModel]) -> Mapping[str, list[str]]:
    """The keys of a body by the place they stand in ("" is the body itself), for every model inside it."""
    found: dict[str, list[str]] = {"": []}
    for name, field in model.model_fields.items():
        key = field.alias or name
        found[""].append(key)
        for inner in _models(field.annotation):
            for place, keys in _keys_under(inner).items():
                found.setdefault(f"{key}.{place}".rstrip("."), []).extend(keys)
    return found


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
