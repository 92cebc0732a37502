"""A fitted router on disk: model.safetensors, and router.json with everything that is not an array.

router.json also says what it was fitted on: the pool and its hash, the experts in the order of the columns, the encoder
and its width.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from experts.errors import ConfigError
from routers.artefacts import Format, flatten, restore
from routers.learned import MODELS
from routers.learned.base import Model
from routers.questions import Questions
from routers.records import Array

FORMAT = Format(
    thing="fitted router",
    head="router.json",
    body="model.safetensors",
    version=3,
    again="collegium router fit NAME --pool DIR --out DIR",
)
_NEWCOMERS = "newcomers."
"""Before the names of their arrays: no model has a field of that name."""


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
    base = fitted.model
    if isinstance(base, Joined):
        arrays |= {f"{_NEWCOMERS}mixture_JE": base.mixture_JE, f"{_NEWCOMERS}level_J": base.level_J}
        base = base.model
    FORMAT.write(folder, flatten(replace(fitted, model=base), "", arrays), arrays)


def load(folder: Path) -> Fitted:
    """Raises ConfigError when the artefact is missing, broken, or of another version."""
    about = FORMAT.read_head(folder)
    with FORMAT.reading(folder, about) as arrays:
        model = restore(model_class(about["name"]), about["model"], arrays)
        values = {f.name: about[f.name] for f in fields(Fitted)}
        fitted = Fitted(
            **{**values, "expert_ids": tuple(values["expert_ids"]), "model": _joined(model, arrays)},
        )
        _try(fitted)
        return fitted


def _try(fitted: Fitted) -> None:
    """Predicts once: whatever does not fit together fails now, not at the first request. Raises ValueError."""
    empty = Questions(vectors_QW=np.zeros((1, fitted.width), np.float32), tasks=(None,), texts=("",))
    scores = fitted.model.predict(empty)
    if scores.shape != (1, len(fitted.expert_ids)) or not np.isfinite(scores).all():
        raise ValueError(f"it scores {scores.shape[-1]} experts, or not by numbers; it names {len(fitted.expert_ids)}")


def _joined(model: Model, arrays: Mapping[str, Array]) -> Model:
    from routers.learned.joined import Joined

    if f"{_NEWCOMERS}level_J" not in arrays:
        return model
    mixture, level = arrays[f"{_NEWCOMERS}mixture_JE"], arrays[f"{_NEWCOMERS}level_J"]
    return Joined(model=model, mixture_JE=mixture, level_J=level)
