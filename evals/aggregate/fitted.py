"""The rewards that are compared, all fitted on the same samples."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from orchestrator.aggregators.reward_moe.armorm import ArmoRM, Gate
from orchestrator.aggregators.reward_moe.armorm_fit import fit_armorm, fit_rewards
from orchestrator.aggregators.reward_moe.corpus import Corpus, make_corpus
from orchestrator.aggregators.reward_moe.dmoerm_fit import fit_dmoerm
from orchestrator.aggregators.reward_moe.inputs import Inputs
from orchestrator.aggregators.reward_moe.model import Model
from orchestrator.aggregators.reward_moe.samples import Sample
from orchestrator.aggregators.reward_moe.single import fit_single
from routers.encoders import Encoder
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """``objective`` says that it is one of ArmoRM's objectives alone; ``base`` that attacks are measured against it."""

    name: str
    model: Model
    objective: bool = False

    def score(self, inputs: Inputs) -> Array:
        return self.model.score(inputs)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedAll:
    train: Corpus
    contestants: tuple[Contestant, ...]


BASE = "single, no attacks"
"""The base reward: one Bradley-Terry head that never saw an attack."""


async def fit_contestants(samples: Sequence[Sample], encoder: Encoder, cache: Path, seed: int) -> FittedAll:
    train = await make_corpus(samples, encoder, cache)
    objectives = fit_rewards(train, seed=seed)
    made: dict[str, Callable[[], Model]] = {
        BASE: lambda: fit_single(train, seed=seed, attacks=False),
        "single": lambda: fit_single(train, seed=seed),
        "uniform": lambda: objectives,
        "armorm": lambda: fit_armorm(train, seed=seed, base=objectives),
        "dmoerm": lambda: fit_dmoerm(train, seed=seed),
    }
    contestants = []
    for name, make in made.items():
        started = time.perf_counter()
        contestants.append(Contestant(name=name, model=make()))
        print(f"  {name}: fitted in {time.perf_counter() - started:.0f} s", flush=True)
    alone = [
        Contestant(name=name, model=replace(objectives, gate=_only(objectives, place)), objective=True)
        for place, name in enumerate(objectives.objectives)
    ]
    return FittedAll(train=train, contestants=(*contestants, *alone))


def _only(model: ArmoRM, place: int) -> Gate:
    """A gate that gives all weight to one objective, whatever the prompt, and to the others exactly none."""
    bias_O = np.full(len(model.objectives), -np.inf, np.float32)
    bias_O[place] = 0
    return replace(model.gate, biases=(bias_O,))
