"""A fitted reward on disk: model.safetensors, and reward.json with everything that is not an array.

reward.json also says what it was fitted on: each source with its hash, the encoder and its width.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from experts.errors import ConfigError
from orchestrator.aggregators.reward_moe.inputs import RAW_NAMES, Scaling, feature_width
from orchestrator.aggregators.reward_moe.model import MODELS, Model
from routers.artefacts import Format, flatten, restore
from routers.records import Array

FORMAT = Format(
    thing="fitted reward",
    head="reward.json",
    body="model.safetensors",
    version=1,
    again="collegium build reward --pool DIR --out DIR",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where examples came from, and the hash of its files."""

    name: str
    digest: str
    answers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A model, how its inputs are made, and what it was fitted on."""

    kind: str
    model: Model
    scaling: Scaling
    encoder: str
    width: int
    sources: tuple[Source, ...]
    pairs: int
    seed: int


def save(fitted: Fitted, folder: Path) -> None:
    """Raises ConfigError where the folder cannot be written."""
    arrays: dict[str, Array] = {}
    about = flatten(fitted, "", arrays)
    FORMAT.write(folder, {"features": RAW_NAMES, **about}, arrays)


def load(folder: Path) -> Fitted:
    """Raises ConfigError when the artefact is missing, broken, of another version, or holds NaN."""
    about = FORMAT.read_head(folder)
    with FORMAT.reading(folder, about) as arrays:
        values = {f.name: about[f.name] for f in fields(Fitted)}
        values["model"] = restore(_model_class(about["kind"]), about["model"], arrays)
        values["scaling"] = restore(Scaling, about["scaling"], arrays)
        values["sources"] = tuple(Source(**source) for source in about["sources"])
        fitted = Fitted(**values)
        _check(fitted, arrays, about, folder)
        return fitted


def _model_class(kind: str) -> type[Any]:
    module, _, attribute = MODELS[kind].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def _check(fitted: Fitted, arrays: Mapping[str, Array], about: Mapping[str, Any], folder: Path) -> None:
    if tuple(about["features"]) != RAW_NAMES:
        raise ConfigError(
            f"The reward in {folder} reads other features than this collegium; make it again: {FORMAT.again}"
        )
    if fitted.model.features != feature_width(fitted.width) or fitted.scaling.mean_F.shape != (len(RAW_NAMES),):
        raise ConfigError(
            f"The reward in {folder} is made for {fitted.model.features} features, an encoder {fitted.width} wide "
            f"gives {feature_width(fitted.width)}; make it again: {FORMAT.again}"
        )
    if bad := [key for key, array in arrays.items() if not np.isfinite(array).all()]:
        raise ConfigError(
            f"The reward in {folder} holds NaN or infinity in {', '.join(bad)}; make it again: {FORMAT.again}"
        )
