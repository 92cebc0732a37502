"""A fitted stack on disk: stack.safetensors, and stack.json with everything that is not an array.

stack.json says what it was fitted on: the pool and its hash, the experts in the order of the columns, the tasks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from orchestrator.aggregators.stacking.build import Stack, Wish, fit_stack
from orchestrator.aggregators.stacking.grams import COLUMNS
from orchestrator.aggregators.stacking.model import Logit
from orchestrator.aggregators.stacking.neighbours import HINTS
from orchestrator.aggregators.stacking.options import TRAITS
from orchestrator.aggregators.stacking.prior import Prior
from orchestrator.aggregators.stacking.recorded import Recorded, usable
from orchestrator.aggregators.stacking.words import WORDS
from routers.artefacts import Format
from routers.records import Array

FORMAT = Format(
    thing="fitted stack",
    head="stack.json",
    body="stack.safetensors",
    version=3,
    again="collegium build stack --pool DIR --out DIR",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A stack, and what it was fitted on."""

    stack: Stack
    expert_ids: tuple[str, ...]
    tasks: tuple[str, ...]
    pool: str
    pool_digest: str
    questions: int
    seed: int
    calls: float


def fit(recorded: Recorded, rows: Array, wish: Wish, *, on_step: Callable[[str], None] = lambda _: None) -> Fitted:
    """Raises ConfigError."""
    return Fitted(
        stack=fit_stack(recorded, rows, wish, on_step=on_step),
        expert_ids=recorded.records.expert_ids,
        tasks=recorded.tasks,
        pool=recorded.records.name,
        pool_digest=recorded.records.digest,
        questions=len(usable(recorded, rows)),
        seed=wish.seed,
        calls=wish.calls,
    )


def save(fitted: Fitted, folder: Path) -> None:
    """Raises ConfigError where the folder cannot be written."""
    stack = fitted.stack
    about = {
        **{f.name: getattr(fitted, f.name) for f in fields(fitted) if f.name != "stack"},
        "order": stack.order,
        "threshold": stack.threshold,
        "traits": TRAITS,
        "words": WORDS,
    }
    FORMAT.write(folder, about, _arrays(stack))


def load(folder: Path) -> Fitted:
    """Raises ConfigError when the artefact is missing, broken, or of another version."""
    about = FORMAT.read_head(folder)
    with FORMAT.reading(folder) as arrays:
        fitted = Fitted(
            stack=_stack(arrays, about),
            expert_ids=tuple(about["expert_ids"]),
            tasks=tuple(about["tasks"]),
            **{key: about[key] for key in ("pool", "pool_digest", "questions", "seed", "calls")},
        )
        _check(fitted)
        return fitted


def _arrays(stack: Stack) -> dict[str, Array]:
    prior = {} if stack.prior is None else _flat(stack.prior, "prior")
    return {
        **_flat(stack.logit, "logit"),
        **prior,
        "word_mean_EW": stack.word_mean_EW,
        "word_scale_W": stack.word_scale_W,
        "curve_XN": stack.curve_XN,
    }


def _flat(part: Any, key: str) -> dict[str, Array]:
    """The arrays of a dataclass and of those in it, by dotted names."""
    found: dict[str, Array] = {}
    for field in fields(part):
        value, name = getattr(part, field.name), f"{key}.{field.name}"
        found |= _flat(value, name) if is_dataclass(value) else {name: value}
    return found


def _part(cls: type[Any], key: str, arrays: Mapping[str, Array]) -> Any:
    """The other way. Raises KeyError for an array that is missing."""
    hints = get_type_hints(cls)
    return cls(
        **{
            f.name: _part(hints[f.name], name, arrays) if is_dataclass(hints[f.name]) else arrays[name]
            for f in fields(cls)
            for name in (f"{key}.{f.name}",)
        }
    )


def _stack(arrays: Mapping[str, Array], about: Mapping[str, Any]) -> Stack:
    return Stack(
        logit=_part(Logit, "logit", arrays),
        prior=_part(Prior, "prior", arrays) if any(name.startswith("prior.") for name in arrays) else None,
        word_mean_EW=arrays["word_mean_EW"],
        word_scale_W=arrays["word_scale_W"],
        order=tuple(int(e) for e in about["order"]),
        threshold=float(about["threshold"]),
        curve_XN=arrays["curve_XN"],
    )


def _check(fitted: Fitted) -> None:
    """Raises ValueError for parts that do not fit each other."""
    experts, logit = len(fitted.expert_ids), fitted.stack.logit
    shapes = {
        "worth_E": (logit.worth_E.shape, (experts,)),
        "in_task_CE": (logit.in_task_CE.shape, (len(fitted.tasks), experts)),
        "words_W": (logit.words_W.shape, (len(WORDS),)),
        "word_mean_EW": (fitted.stack.word_mean_EW.shape, (experts, len(WORDS))),
        "shape": (logit.shape.shape, (5,)),
    }
    if (prior := fitted.stack.prior) is not None:
        shapes["grams_MN"] = (prior.grams_MN.shape, (len(prior.outer_MH), COLUMNS))
        shapes["mean_T"] = (prior.mean_T.shape, (len(TRAITS) + HINTS,))
        prior.neighbours.check()
    for name, (found, due) in shapes.items():
        if found != due:
            raise ValueError(f"{name} is {found}, expected {due}")
    if not all(np.isfinite(array).all() for array in _arrays(fitted.stack).values()):
        raise ValueError("a number in it is not finite")
