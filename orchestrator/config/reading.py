"""The config file: bytes to a checked Config."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from experts.errors import ConfigError
from orchestrator.config.mistakes import contradictions, explain
from orchestrator.config.models import Config

MAX_BYTES = 2**20


def load_config(path: Path) -> Config:
    """Read and check ``path``. Raises ConfigError that names the place, the mistake and the nearest right word."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"Cannot read {path}: {exc.strerror}. 'collegium init' writes one that works.") from exc
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes: no config of this service.")
    data, lines = _parse_yaml(raw, path)
    return parse_config(data, source=str(path), lines=lines)


def parse_config(data: object, *, source: str = "config", lines: Mapping[str, int] | None = None) -> Config:
    """Check ``data``. Raises ConfigError with one line a mistake, that says where it stands in the file where ``lines``
    has the line of each key, by its path ("limits.queue")."""
    if data is None:
        raise ConfigError(f"{source} is empty. 'collegium init' writes one that works.")
    try:
        config = Config.model_validate(data)
    except ValidationError as exc:
        raise _mistaken(source, [explain(error) for error in exc.errors()], lines or {}) from exc
    if mistakes := list(contradictions(config)):
        raise _mistaken(source, mistakes, lines or {})
    return config


def _mistaken(source: str, mistakes: list[str], lines: Mapping[str, int]) -> ConfigError:
    told = "\n".join(f"  {_at(mistake, lines)}{mistake}" for mistake in mistakes)
    return ConfigError(f"{source} has {len(mistakes)} mistake(s):\n{told}")


def _at(mistake: str, lines: Mapping[str, int]) -> str:
    """The line of the key that ``mistake`` begins with, or of the nearest one around it."""
    place = mistake.partition(":")[0]
    while place and place not in lines:
        place = place.rpartition(".")[0]
    return f"line {lines[place]}: " if place else ""


def _lines(node: yaml.Node | None, path: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    """The line of each key below ``node``; of what aliases repeat, once."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    rows: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        rows = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        rows = [(str(i), value, value) for i, value in enumerate(node.value)]
    for name, key, value in rows:
        place = f"{path}.{name}" if path else name
        yield place, key.start_mark.line + 1
        yield from _lines(value, place, seen)


def _parse_yaml(raw: bytes, path: Path) -> tuple[object, Mapping[str, int]]:
    """What stands in it, and the line of each key."""
    try:
        loader = _Loader(raw.decode("utf-8-sig"))
        loader.name = path.name  # for the places it names in its errors
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
        return data, dict(_lines(node, "", set()))
    except RecursionError as exc:
        raise ConfigError(f"{path} is nested too deeply.") from exc
    except (yaml.YAMLError, ValueError) as exc:
        raise ConfigError(f"{path} is not YAML: {exc}") from exc


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML's usual loaders let the second win in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            word = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key
            if word in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands twice in one mapping", key.start_mark
                )
            seen.add(word)
        return node


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


# A date stays the text that it is: no key of ours takes one, and a demonstration may well answer with one.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _text)
