"""A fitted reward in service: embeds a request and its answers, and scores them.

Legend: A answers, W width of the embedding.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experts.base import Reward, Score
from experts.errors import ConfigError
from experts.types import Completion, Request
from orchestrator.aggregators.base import AggregatorParts
from orchestrator.aggregators.extract import read_request
from orchestrator.aggregators.reward_moe import artefact
from orchestrator.aggregators.reward_moe.artefact import Fitted
from orchestrator.aggregators.reward_moe.external import EXTERNAL, make_external
from orchestrator.aggregators.reward_moe.features import own_part
from orchestrator.aggregators.reward_moe.inputs import Panel, make_panel, raw_features
from routers.encoders import Encoder
from routers.records import Array
from routers.static import WordLlama

_AT_ONCE_CHARS = 50_000
"""Longer texts are read in a thread."""


def load_reward(folder: Path, parts: AggregatorParts) -> Reward:
    """The reward in ``folder``: a fitted one, or an external one (external.py says what its reward.json holds).

    Raises ConfigError when it is missing or broken, or was fitted on embeddings that cannot be had here. The static
    encoder is made where it is needed; any other must be the service's.
    """
    about = artefact.FORMAT.read_head(folder)
    if about.get("kind") in EXTERNAL:
        return make_external(about, folder)
    fitted = artefact.load(folder)
    return FittedReward(fitted, _encoder(fitted, parts.encoder, folder))


def _encoder(fitted: Fitted, service: Callable[[], Encoder], folder: Path) -> Encoder:
    encoder = WordLlama() if fitted.encoder == WordLlama.NAME else service()
    if (encoder.name, encoder.width) != (fitted.encoder, fitted.width):
        raise ConfigError(
            f"The reward in {folder} was fitted on embeddings of '{fitted.encoder}' ({fitted.width} wide), the "
            f"service's encoder is '{encoder.name}' ({encoder.width} wide); set encoder.model, or fit it again."
        )
    return encoder


class FittedReward:
    def __init__(self, fitted: Fitted, encoder: Encoder) -> None:
        self.name = fitted.kind
        self.fitted = fitted
        self._encoder = encoder

    async def score(self, request: Request, answers: Sequence[Completion]) -> list[Score]:
        texts = [answer.text or "" for answer in answers]
        if not texts:
            return []
        if sum(map(len, texts)) + len(request.question) < _AT_ONCE_CHARS:
            panel = _read(request, texts)
        else:
            panel = await asyncio.to_thread(_read, request, texts)
        vectors = await self._encoder.encode([panel.question, *map(own_part, texts)])
        if sum(map(len, texts)) < _AT_ONCE_CHARS:
            return self.score_panel(panel, vectors[1:], vectors[:1])
        return await asyncio.to_thread(self.score_panel, panel, vectors[1:], vectors[:1])

    def score_panel(self, panel: Panel, answers_AW: Array, prompt_1W: Array) -> list[Score]:
        """From embeddings that are known already."""
        rows = np.zeros(len(panel.texts), np.int64)
        inputs = self.fitted.scaling.inputs(raw_features(panel, answers_AW), answers_AW, prompt_1W, rows)
        values_A, parts = self.fitted.model.score(inputs)
        if not np.isfinite(values_A).all():
            raise ConfigError(f"The reward '{self.name}' gave NaN or infinity; its encoder does not fit it.")
        return [Score(value=float(value), parts=part) for value, part in zip(values_A, parts, strict=True)]


def _read(request: Request, texts: Sequence[str]) -> Panel:
    return make_panel(request.question, read_request(request).options, texts)
