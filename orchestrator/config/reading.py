"""The config file: bytes to a checked Config."""

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
    return parse_config(_parse_yaml(raw, path), source=str(path))


def parse_config(data: object, *, source: str = "config") -> Config:
    """Check ``data``. Raises ConfigError with one line a mistake."""
    if data is None:
        raise ConfigError(f"{source} is empty. 'collegium init' writes one that works.")
    try:
        config = Config.model_validate(data)
    except ValidationError as exc:
        raise _mistaken(source, [explain(error) for error in exc.errors()]) from exc
    if mistakes := list(contradictions(config)):
        raise _mistaken(source, mistakes)
    return config


def _mistaken(source: str, mistakes: list[str]) -> ConfigError:
    return ConfigError(f"{source} has {len(mistakes)} mistake(s):\n" + "\n".join(f"  {m}" for m in mistakes))


def _parse_yaml(raw: bytes, path: Path) -> object:
    try:
        loader = _Loader(raw.decode("utf-8-sig"))
        loader.name = path.name  # for the places it names in its errors
        return loader.get_single_data()
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
