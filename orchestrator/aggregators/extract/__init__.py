"""The answer inside a text: one small pure function a kind, each giving equal answers equal strings.

All are linear in the text's length. Voters, and whoever else compares answers (scorers, stacks), read them with these;
``same`` compares two.
"""

from collections.abc import Callable

from experts.errors import ConfigError
from orchestrator.aggregators.extract.answers import boxed, number, same, stated, value
from orchestrator.aggregators.extract.auto import Asked, auto, read_request
from orchestrator.aggregators.extract.fields import canonical_json, json_field
from orchestrator.aggregators.extract.letters import letter, read_options, read_stem
from orchestrator.aggregators.extract.numbers import settle_percents
from orchestrator.aggregators.extract.plain import plain

__all__ = [
    "Asked",
    "Extract",
    "auto",
    "boxed",
    "canonical_json",
    "json_field",
    "letter",
    "make_extract",
    "number",
    "plain",
    "read_options",
    "read_request",
    "read_stem",
    "same",
    "settle_percents",
    "stated",
    "value",
]

Extract = Callable[[str, Asked], str | None]
"""An answer's text, and what was asked, to the answer in canonical form, or None where there is none."""

KINDS: dict[str, Extract] = {
    "auto": auto,
    "letter": lambda text, asked: letter(text, asked.options),
    "number": lambda text, asked: number(text),
    "boxed": lambda text, asked: boxed(text),
    "json": lambda text, asked: json_field(text),
    "text": lambda text, asked: plain(text),
}


def make_extract(kind: str, field: str | None = None) -> Extract:
    """The extraction called ``kind``; ``field`` is the path of a JSON field. Raises ConfigError."""
    if kind not in KINDS:
        raise ConfigError(f"extract: no kind '{kind}'; known: {', '.join(KINDS)}, and embedding to vote by meaning.")
    if field is None:
        return KINDS[kind]
    if kind != "json":
        raise ConfigError(f"extract: 'field' belongs to the kind 'json', not to '{kind}'.")
    return lambda text, asked: json_field(text, field)
