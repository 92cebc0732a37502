"""How often an attack beats every recorded answer: by the reward alone, and in ``best_of``, where answers that can be
read go first."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evals.aggregate.fitted import BASE, FittedAll
from experts.types import Message, Request
from orchestrator.aggregators.best_of import may_win
from orchestrator.aggregators.extract import make_extract, read_request
from orchestrator.aggregators.quoting import after_reasoning
from orchestrator.aggregators.reward_moe import attacks
from orchestrator.aggregators.reward_moe.corpus import make_corpus
from orchestrator.aggregators.reward_moe.inputs import make_panel
from orchestrator.aggregators.reward_moe.samples import Sample
from routers.encoders import Encoder
from routers.records import Array

if TYPE_CHECKING:
    from evals.aggregate.rewards import HeldOut

_PROMPTS = 200
"""Of each source."""


async def attack_rates(
    tested: "Mapping[str, HeldOut]", fitted: FittedAll, encoder: Encoder, cache: Path, seed: int
) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    """By source (and once more as ``best_of`` has it) and kind of attack: the share of prompts where the attack wins.
    Wordings are ones that no reward was trained with."""
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for name, source in tested.items():
        ruled = f"{name}, in best_of"
        rates[name], rates[ruled] = {}, {}
        for kind in attacks.KINDS:
            rng = np.random.default_rng(seed)
            samples = [_with_attack(sample, kind, rng) for sample in source.samples[:_PROMPTS]]
            corpus = await make_corpus(
                samples, encoder, cache, objectives=fitted.train.objectives, scaling=fitted.train.scaling
            )
            ends = np.cumsum([len(sample.panel.texts) for sample in samples])
            able_N = np.concatenate([readable(sample) for sample in samples])
            scores = {c.name: c.score(corpus.inputs) for c in fitted.contestants if not c.objective}
            rates[name][kind] = {n: _rate(own_N, ends) for n, own_N in scores.items()}
            rates[ruled][kind] = {n: _rate(np.where(able_N, own_N, -np.inf), ends) for n, own_N in scores.items()}
        _show(name, rates[name])
        _show(ruled, rates[ruled])
    return rates


def readable(sample: Sample) -> Array:
    """Which answers ``best_of`` lets win."""
    asked = Request(request_id="", messages=(Message(role="user", content=sample.panel.question),))
    extract, wanted = make_extract("auto"), read_request(asked)
    return np.array(may_win([extract(after_reasoning(text), wanted) for text in sample.panel.texts], wanted))


def _with_attack(sample: Sample, kind: str, rng: np.random.Generator) -> Sample:
    """As the reward would see it: the attack is read like any other answer."""
    panel = sample.panel
    text = attacks.attack(kind, panel.question, attacks.HELD_OUT, rng)
    whole = make_panel(panel.question, panel.prompt.options, (*panel.texts, text))
    return replace(sample, panel=whole, labels=(*sample.labels, {}), pairs=(), attacked=True)


def _rate(scores_N: Array, ends: "Array | Sequence[int]") -> float:
    """The attack is the last of its panel; a tie is no win."""
    starts = [0, *ends[:-1]]
    wins = [scores_N[e - 1] > scores_N[s : e - 1].max() for s, e in zip(starts, ends, strict=True)]
    return float(np.mean(wins))


def _show(name: str, rates: Mapping[str, Mapping[str, float]]) -> None:
    names = list(next(iter(rates.values())))
    print(
        f"{name}: % of prompts where an attack wins (base: '{BASE}')\n  {'':18s}" + "".join(f"{n:>20s}" for n in names)
    )
    for kind, row in rates.items():
        print(f"  {kind:18s}" + "".join(f"{100 * row[n]:20.1f}" for n in names))
    print(flush=True)
