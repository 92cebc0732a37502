"""From a question and its answers to the numbers that rewards are fitted on and score.

f(x, y) of an answer y to a prompt x: the answer's embedding, its product with the prompt's, their cosine, the surface
features, the agreement with the other answers, and a constant. The gate and the outer route see the prompt alone.

Legend: N answers, P prompts, W width of the embedding, D features, G = len(AGREEMENT).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from orchestrator.aggregators.extract.numbers import settle_percents
from orchestrator.aggregators.reward_moe.features import NAMES, Prompt, read_choice, read_prompt, surface_matrix
from routers.records import Array

AGREEMENT = ("same_share", "is_largest", "groups_share", "log_answers", "mean_cosine", "best_cosine")
_EMBEDDING_SCALE = 4.0
"""Embeddings have unit length: each coordinate is small beside a column of unit spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A question as it is asked, its options written out in it, and several answers to it. ``choices`` is what each
    answer settles on, None where that cannot be read or does not exist."""

    question: str
    prompt: Prompt
    texts: tuple[str, ...]
    choices: tuple[str | None, ...]


def make_panel(
    question: str, options: Sequence[str], texts: Sequence[str], choices: Sequence[str | None] | None = None
) -> Panel:
    """``choices`` are read from the texts where they are not known already."""
    return Panel(
        question=question,
        prompt=read_prompt(question, options),
        texts=tuple(texts),
        choices=tuple(read_choice(text, options) for text in texts) if choices is None else tuple(choices),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """``prompt_N`` says whose answer a row of ``features_ND`` is: a row of ``prompts_PW``."""

    features_ND: Array
    prompts_PW: Array
    prompt_N: Array

    def __len__(self) -> int:
        return len(self.prompt_N)

    def take(self, rows: Array) -> Self:
        return type(self)(features_ND=self.features_ND[rows], prompts_PW=self.prompts_PW, prompt_N=self.prompt_N[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Surface and agreement features to zero mean and unit variance, as they were in the training data."""

    mean_F: Array
    scale_F: Array

    @classmethod
    def fit(cls, raw_NF: Array) -> Self:
        spread = raw_NF.std(axis=0, dtype=np.float64)
        return cls(
            mean_F=raw_NF.mean(axis=0, dtype=np.float64).astype(np.float32),
            scale_F=(1 / np.maximum(spread, 0.05)).astype(np.float32),
        )

    def inputs(self, raw_NF: Array, answers_NW: Array, prompts_PW: Array, prompt_N: Array) -> Inputs:
        """``answers_NW`` and ``prompts_PW`` are embeddings of unit length."""
        # Six deviations out, a text is like nothing in the training data, and a linear model would believe anything.
        surface_NF = np.clip((raw_NF - self.mean_F) * self.scale_F, -6, 6)
        own_NW = prompts_PW[prompt_N]
        product_NW = answers_NW * own_NW
        cosine_N = product_NW.sum(axis=1, keepdims=True)
        width = answers_NW.shape[1]
        parts = (
            answers_NW * _EMBEDDING_SCALE,
            product_NW * (_EMBEDDING_SCALE * math.sqrt(width) / 2),
            cosine_N,
            surface_NF,
            np.ones_like(cosine_N),
        )
        return Inputs(
            features_ND=np.concatenate(parts, axis=1, dtype=np.float32), prompts_PW=prompts_PW, prompt_N=prompt_N
        )


RAW_NAMES = (*NAMES, *AGREEMENT)
BLOCKS = ("embedding", "surface", "agreement")


def feature_width(width: int) -> int:
    return 2 * width + 1 + len(RAW_NAMES) + 1


def block_slices(width: int) -> dict[str, slice]:
    """Where the columns of each of BLOCKS stand; the constant belongs to the last."""
    surface, agreement = 2 * width + 1, 2 * width + 1 + len(NAMES)
    return {
        "embedding": slice(0, surface),
        "surface": slice(surface, agreement),
        "agreement": slice(agreement, feature_width(width)),
    }


def raw_features(panel: Panel, answers_AW: Array) -> Array:
    """Surface and agreement features of one panel, before scaling."""
    surface_AF = surface_matrix(panel.texts, [panel.prompt] * len(panel.texts), panel.choices)
    return np.concatenate([surface_AF, agreement(panel.choices, answers_AW)], axis=1, dtype=np.float32)


def agreement(choices: Sequence[str | None], answers_AW: Array) -> Array:
    """AGREEMENT of each answer with the others of its panel; does not depend on their order. One answer alone agrees
    with nobody: all zero."""
    found = np.zeros((len(choices), len(AGREEMENT)), np.float32)
    others = len(choices) - 1
    if others < 1:
        return found
    names = settle_percents(choices)
    counts = Counter(name for name in names if name is not None)
    most = max(counts.values(), default=0)
    for row, name in enumerate(names):
        own = counts[name] if name is not None else 0
        found[row, 0] = max(own - 1, 0) / others
        found[row, 1] = own == most and own > 1
    found[:, 2] = len(counts) / len(choices)
    found[:, 3] = math.log(len(choices))
    cosines_AA = answers_AW @ answers_AW.T
    np.fill_diagonal(cosines_AA, 0)
    found[:, 4] = cosines_AA.sum(axis=1) / others
    np.fill_diagonal(cosines_AA, -1)
    found[:, 5] = cosines_AA.max(axis=1)
    return found
