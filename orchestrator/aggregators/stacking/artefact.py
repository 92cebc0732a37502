"""A fitted stack on disk: stack.safetensors, and stack.json with everything that is not an array.

stack.json says what it was fitted on: the pool and its hash, the experts in the order of the columns, the tasks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.aggregators.stacking.build import Stack, Wish, fit_stack
from orchestrator.aggregators.stacking.grams import COLUMNS
from orchestrator.aggregators.stacking.neighbours import HINTS
from orchestrator.aggregators.stacking.options import TRAITS
from orchestrator.aggregators.stacking.recorded import Recorded, usable
from orchestrator.aggregators.stacking.stopping import NEVER_BELOW
from orchestrator.aggregators.stacking.words import WORDS
from routers.artefacts import Format, flatten, restore
from routers.records import Array

FORMAT = Format(
    thing="fitted stack",
    head="stack.json",
    body="stack.safetensors",
    version=5,
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
    arrays: dict[str, Array] = {}
    about = flatten(fitted, "", arrays)
    FORMAT.write(folder, {**about, "traits": TRAITS, "words": WORDS}, arrays)


def load(folder: Path) -> Fitted:
    """Raises ConfigError when the artefact is missing, broken, of another version, or holds NaN."""
    about = FORMAT.read_head(folder)
    with FORMAT.reading(folder, about) as arrays:
        fitted: Fitted = restore(Fitted, about, arrays)
        _check(fitted, arrays)
        return fitted


def _check(fitted: Fitted, arrays: Mapping[str, Array]) -> None:
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
    stop = fitted.stack.stop
    if not (0 <= stop.threshold <= 1 and NEVER_BELOW <= stop.least_gain <= 1):
        raise ValueError(f"nobody stops by {stop!r}")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("a number in it is not finite")
