"""The base reward: one Bradley-Terry head on the features of an answer, blind to what kind of prompt it answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from orchestrator.aggregators.reward_moe.bradley_terry import (
    Schedule,
    deterministic,
    held_out_pairs,
    loss_of,
    minimise,
)
from orchestrator.aggregators.reward_moe.corpus import Corpus
from orchestrator.aggregators.reward_moe.inputs import Inputs, block_slices
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    weight_D: Array
    width: int

    @property
    def features(self) -> int:
        return len(self.weight_D)

    def score(self, inputs: Inputs) -> tuple[Array, list[Mapping[str, float]]]:
        """What a reward is made of: the blocks of features, which add up to it."""
        terms_ND = inputs.features_ND * self.weight_D
        blocks = {name: terms_ND[:, where].sum(axis=1) for name, where in block_slices(self.width).items()}
        parts = [{name: float(values[row]) for name, values in blocks.items()} for row in range(len(inputs))]
        return terms_ND.sum(axis=1), list(parts)


def fit_single(
    corpus: Corpus,
    *,
    seed: int,
    attacks: bool = True,
    schedule: Schedule | None = None,
    on_advance: Callable[[int], None] = lambda _: None,
) -> Single:
    """``attacks`` False leaves the attacks among the training pairs out: the undefended base."""
    import torch

    kept = np.flatnonzero(corpus.real_N[corpus.pairs_K2].all(axis=1) | attacks)
    pairs_K2, weights_K = corpus.pairs_K2[kept], corpus.weights_K[kept]
    schedule = schedule or Schedule(lr=3e-3, weight_decay=0.03, seed=seed)
    with deterministic(seed):
        features_ND = corpus.inputs.features_ND
        gaps = torch.from_numpy(features_ND[pairs_K2[:, 0]] - features_ND[pairs_K2[:, 1]])
        weight = torch.zeros(features_ND.shape[1], requires_grad=True)
        train, held_out = held_out_pairs(corpus.inputs.prompt_N[pairs_K2[:, 0]], 0.1, seed)

        def loss(rows: Array) -> torch.Tensor:
            found = gaps[rows] @ weight
            return loss_of(found, torch.zeros_like(found))

        minimise([weight], loss, train, held_out, schedule, weights=weights_K, on_advance=on_advance)
    return Single(weight_D=weight.detach().numpy().astype(np.float32), width=corpus.inputs.prompts_PW.shape[1])
