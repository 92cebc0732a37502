"""One choice of a few, asked of a model: the prompt's labels, the format that allows nothing else, and the answer read.

A label is a letter that stands for an expert of the pool. Whatever the model writes, what is read is a label of the
list or nothing, so that no text, the caller's or the model's, can name an expert that is not in the pool.
"""

import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from experts.types import JSON, Completion

LABELS = string.ascii_uppercase
_KEYED = re.compile(r'"choice"\s*:\s*"([A-Z])"')
_BARE = re.compile(r"^\W*([A-Z])\W*$")
_MISSING = 4.0
"""What a label that is not among the log-probabilities told has less than the least of those told."""


def choice_format(labels: Sequence[str]) -> JSON:
    """OpenAI's response_format for {"choice": one of ``labels``}; vLLM holds the model to it token by token."""
    schema = {
        "type": "object",
        "properties": {"choice": {"type": "string", "enum": list(labels)}},
        "required": ["choice"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "choice", "strict": True, "schema": schema}}


def read_choice(text: str, labels: Sequence[str]) -> str | None:
    """The label that ``text`` chooses: one only, in the format or alone. Two different ones, or none, are no choice."""
    found = set(_KEYED.findall(text)) or {m[1] for m in [_BARE.match(text)] if m}
    return next(iter(found)) if len(found) == 1 and found <= set(labels) else None


def choice_probabilities(answer: Completion, label: str, labels: Sequence[str]) -> dict[str, float] | None:
    """The model's probability of each label, from the log-probabilities of the token that decided; None where the
    engine told none. They are the model's own, before the format held it to the labels."""
    told = _told(answer, label, labels)
    if label not in told:
        return None
    least = min(told.values()) - _MISSING
    weights = {name: math.exp(told.get(name, least) - max(told.values())) for name in labels}
    total = sum(weights.values())
    return {name: w / total for name, w in weights.items()}


def _told(answer: Completion, label: str, labels: Sequence[str]) -> dict[str, float]:
    entries = (answer.logprobs or {}).get("content") or []
    place, written = _place(answer.text, label), ""
    for entry in entries:
        written += str(entry.get("token", ""))
        if len(written) > place:
            return _by_label([*(entry.get("top_logprobs") or []), entry], labels)
    return {}


def _place(text: str, label: str) -> int:
    keyed = _KEYED.search(text)
    return keyed.start(1) if keyed else text.find(label)


def _by_label(entries: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, float]:
    """The likeliest spelling of each label: `A`, ` A` and `"A` all say A."""
    told: dict[str, float] = {}
    for entry in entries:
        name, logprob = str(entry.get("token", "")).strip(' "\n'), entry.get("logprob")
        if name in set(labels) and isinstance(logprob, int | float) and math.isfinite(logprob):
            told[name] = max(told.get(name, -math.inf), float(logprob))
    return told
