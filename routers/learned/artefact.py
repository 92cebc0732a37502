"""A fitted router on disk: model.safetensors, and router.json with everything that is not an array.

router.json also says what it was fitted on: the pool and its hash, the experts in the order of the columns, the encoder
and its width.
"""

import importlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np

from experts.errors import ConfigError
from routers.artefacts import Format
from routers.learned import MODELS
from routers.learned.base import Model
from routers.records import Array

FORMAT = Format(
    thing="fitted router",
    head="router.json",
    body="model.safetensors",
    version=1,
    again="collegium router fit NAME --pool DIR --out DIR",
)
_NEWCOMERS = "newcomers."
"""Before the names of their arrays: no model has a field of that name."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A model, and what it was fitted on."""

    name: str
    model: Model
    expert_ids: tuple[str, ...]
    pool: str
    pool_digest: str
    encoder: str
    width: int
    questions: int
    seed: int


def model_class(name: str) -> type[Model]:
    if name not in MODELS:
        raise ConfigError(f"No learned router '{name}'; known: {', '.join(MODELS)}.")
    module, _, attribute = MODELS[name].partition(":")
    found: type[Model] = getattr(importlib.import_module(module), attribute)
    return found


def save(fitted: Fitted, folder: Path) -> None:
    """Raises ConfigError where the folder cannot be written."""
    from routers.learned.joined import Joined

    arrays: dict[str, Array] = {}
    plain: dict[str, Any] = {}
    base = fitted.model
    if isinstance(base, Joined):
        arrays |= {f"{_NEWCOMERS}mixture_JE": base.mixture_JE, f"{_NEWCOMERS}level_J": base.level_J}
        base = base.model
    _pack(base, "", arrays, plain)
    head = {f.name: getattr(fitted, f.name) for f in fields(fitted) if f.name != "model"}
    FORMAT.write(folder, {**head, "model": plain}, arrays)


def load(folder: Path) -> Fitted:
    """Raises ConfigError when the artefact is missing, broken, or of another version."""
    about = FORMAT.read_head(folder)
    with FORMAT.reading(folder) as arrays:
        model = _joined(_unpack(model_class(about["name"]), "", arrays, about["model"]), arrays)
        head = {f.name: about[f.name] for f in fields(Fitted) if f.name != "model"}
        return Fitted(**{**head, "expert_ids": tuple(head["expert_ids"])}, model=model)


def _joined(model: Model, arrays: Mapping[str, Array]) -> Model:
    from routers.learned.joined import Joined

    if f"{_NEWCOMERS}level_J" not in arrays:
        return model
    mixture, level = arrays[f"{_NEWCOMERS}mixture_JE"], arrays[f"{_NEWCOMERS}level_J"]
    return Joined(model=model, mixture_JE=mixture, level_J=level)


def _pack(thing: object, prefix: str, arrays: dict[str, Array], plain: dict[str, Any]) -> None:
    assert is_dataclass(thing)  # noqa: S101  # a model is one, by its contract
    for f in fields(thing):
        key, value = f"{prefix}{f.name}", getattr(thing, f.name)
        if isinstance(value, np.ndarray):
            arrays[key] = value
        elif is_dataclass(value):
            _pack(value, f"{key}.", arrays, plain)
        else:
            plain[key] = value


def _unpack(cls: type[T], prefix: str, arrays: Mapping[str, Array], plain: Mapping[str, Any]) -> T:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for f in fields(cls):  # type: ignore[arg-type]  # a model is a dataclass, by its contract
        key, hint = f"{prefix}{f.name}", hints[f.name]
        if isinstance(hint, type) and is_dataclass(hint):
            values[f.name] = _unpack(hint, f"{key}.", arrays, plain)
        elif key in arrays:
            values[f.name] = arrays[key]
        elif key in plain or (f.default is MISSING and f.default_factory is MISSING):
            # What came to a model later has a default: artefacts from before it are still read.
            value = plain[key]
            values[f.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
