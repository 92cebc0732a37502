"""A fitted reward on disk: model.safetensors, and reward.json with everything that is not an array.

reward.json also says what it was fitted on: each source with its hash, the encoder and its width.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from experts.errors import ConfigError
from orchestrator.aggregators.reward_moe.inputs import RAW_NAMES, Scaling, feature_width
from orchestrator.aggregators.reward_moe.model import MODELS, Model
from routers.artefacts import Format
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
    parts = {f.name: _flatten(getattr(fitted, f.name), f.name, arrays) for f in fields(fitted)}
    FORMAT.write(folder, {"features": RAW_NAMES, **parts}, arrays)


def load(folder: Path) -> Fitted:
    """Raises ConfigError when the artefact is missing, broken, of another version, or holds NaN."""
    about = FORMAT.read_head(folder)
    with FORMAT.reading(folder) as arrays:
        values = {f.name: about[f.name] for f in fields(Fitted)}
        values["model"] = _restore(_model_class(about["kind"]), about["model"], arrays)
        values["scaling"] = _restore(Scaling, about["scaling"], arrays)
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


def _flatten(value: Any, key: str, arrays: dict[str, Array]) -> Any:
    """JSON with arrays by name."""
    if isinstance(value, np.ndarray):
        arrays[key] = value
        return {"array": key}
    if is_dataclass(value):
        return {f.name: _flatten(getattr(value, f.name), f"{key}.{f.name}", arrays) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: _flatten(item, f"{key}.{name}", arrays) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_flatten(item, f"{key}.{place}", arrays) for place, item in enumerate(value)]
    return value


def _restore(hint: Any, plain: Any, arrays: Mapping[str, Array]) -> Any:
    """The other way; ``hint`` says which classes."""
    if isinstance(plain, dict) and plain.keys() == {"array"}:
        return arrays[plain["array"]]
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: _restore(hints[f.name], plain[f.name], arrays) for f in fields(hint)})
    if get_origin(hint) is tuple:
        return tuple(_restore(get_args(hint)[0], item, arrays) for item in plain)
    if isinstance(plain, dict):
        return {name: _restore(get_args(hint)[1], item, arrays) for name, item in plain.items()}
    return plain
