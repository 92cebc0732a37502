"""Rewards by the name that ``best_of`` uses. Adding one: a class that takes AggregatorParts, a line here."""

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experts.base import Reward, Score
from experts.errors import ConfigError
from experts.types import Completion, Request
from orchestrator.aggregators.base import AggregatorParts

REWARDS = {"agreement": "orchestrator.aggregators.rewards:Agreement"}
TRAINED = "orchestrator.aggregators.reward_moe:load_reward"
"""Makes the reward of an artefact's folder."""


def make_reward(name: str | None, parts: AggregatorParts) -> Reward:
    """The reward called ``name``; without a name the artefact's, or agreement. Raises ConfigError."""
    if name is None and parts.artefact is not None:
        trained: Reward = _load(TRAINED)(parts.artefact, parts)
        return trained
    name = name or "agreement"
    if name not in REWARDS:
        raise ConfigError(f"option 'reward': no reward '{name}'; known: {', '.join(REWARDS)}, or give an artefact.")
    built_in: Reward = _load(REWARDS[name])(parts)
    return built_in


def _load(where: str) -> Any:
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Agreement:
    """The mean cosine of an answer to the others: the one in their middle wins, whatever its form. What minimum Bayes
    risk decoding does with whole texts (Kumar and Byrne, 2004)."""

    name = "agreement"

    def __init__(self, parts: AggregatorParts) -> None:
        self._encoder = parts.encoder

    async def score(self, request: Request, answers: Sequence[Completion]) -> list[Score]:
        if len(answers) < 2:
            return [Score(value=0.0) for _ in answers]
        encoder = await asyncio.to_thread(self._encoder)
        vectors = await encoder.encode([a.text or "" for a in answers])
        cosines = np.clip(vectors @ vectors.T, -1.0, 1.0).astype(np.float64)
        means = (cosines.sum(axis=1) - cosines.diagonal()) / (len(answers) - 1)
        return [Score(value=round(float(mean), 6), parts={"agreement": float(mean)}) for mean in means]
