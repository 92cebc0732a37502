"""Numbers and texts that come with a question, as lines a model can read (the prompt of LLMoE, arXiv 2501.09636): for
each day, say, its features and its headlines, or that there are none."""

import math
from collections.abc import Mapping, Sequence

import orjson

from experts.errors import BadRequest

ROWS, NUMBERS, TEXTS, TEXT_CHARS = 32, 32, 16, 200
"""What of it is read; a longer one is refused, a longer text is cut."""

_FORM = (
    'metadata.rows is a list of {"label": text, "numbers": {name: number}, "texts": [text]}, or its JSON: at most '
    f"{ROWS} rows of {NUMBERS} numbers and {TEXTS} texts."
)


def render_rows(value: object) -> str:
    """Raises BadRequest for what is not of the form. No rows give an empty text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as exc:
            raise BadRequest(f"{_FORM} It is not JSON: {exc}.", param="metadata.rows") from exc
    if not isinstance(value, Sequence) or len(value) > ROWS:
        raise BadRequest(_FORM, param="metadata.rows")
    return "\n".join(_render(row) for row in value)


def _render(row: object) -> str:
    label, numbers, texts = _checked(row)
    shown = ", ".join(f"{_line(name)}={number:.4g}" for name, number in numbers.items()) or "no numbers"
    said = " | ".join(_line(text) for text in texts) or "no news"
    return f"{_line(label)}: {shown}; {said}"


def _checked(row: object) -> tuple[str, Mapping[str, float], Sequence[str]]:
    if not isinstance(row, Mapping) or set(row) - {"label", "numbers", "texts"}:
        raise BadRequest(_FORM, param="metadata.rows")
    label, numbers, texts = row.get("label", ""), row.get("numbers") or {}, row.get("texts") or []
    fits = (
        isinstance(label, str)
        and isinstance(numbers, Mapping)
        and len(numbers) <= NUMBERS
        and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers.values())
        and isinstance(texts, list | tuple)
        and len(texts) <= TEXTS
        and all(isinstance(t, str) for t in texts)
    )
    if not fits:
        raise BadRequest(_FORM, param="metadata.rows")
    return label, numbers, texts


def _line(text: str) -> str:
    return " ".join(text.split())[:TEXT_CHARS]
