"""The config that works as it stands: 'collegium init' writes it, and commands read it where there is no other."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.config import Config

FILENAME = "collegium.yaml"


def starter_text() -> str:
    return files(__name__).joinpath(FILENAME).read_text(encoding="utf-8")


def find_config(path: Path | None) -> Path | None:
    """``path``, else ./collegium.yaml if there is one, else None: the embedded default."""
    here = Path(FILENAME)
    return path or (here if here.exists() else None)


def read_config(path: Path | None) -> "Config":
    """The config in ``path``, or the embedded default for None. Raises ConfigError."""
    import yaml

    from orchestrator.config import load_config, parse_config

    if path is not None:
        return load_config(path)
    return parse_config(yaml.safe_load(starter_text()), source="the embedded default")
