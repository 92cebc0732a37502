"""Two towers trained by two contrasts (after RouterDC, arXiv 2409.19886), on embeddings that stay as they are.

A question should be nearer to an expert that answers it well than to those that fail it, and nearer to a question of
its own cluster than to questions of others. Scores are shares: the softmax of the cosines.

Legend: Q questions, D features, R rank, E experts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from routers.learned.base import Training, split_folds
from routers.questions import Design, Questions
from routers.records import Array

if TYPE_CHECKING:
    from torch import Generator, Tensor

RANK, CLUSTERS = 32, 8
_EPOCHS, _PATIENCE, _BATCH, _OTHERS = 30, 4, 256, 8
_TEMPERATURE, _SAMPLE_WEIGHT, _DECAY = 0.2, 0.2, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrastive:
    design: Design
    tower_DR: Array
    bias_R: Array
    experts_RE: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        design = Design.fit(training.questions)
        tower, bias, experts = _train(design.features(training.questions), training.scores_QE, training.seed)
        return cls(design=design, tower_DR=tower, bias_R=bias, experts_RE=experts)

    def predict(self, questions: Questions) -> Array:
        placed = self.design.features(questions) @ self.tower_DR + self.bias_R
        placed = placed / np.maximum(np.linalg.norm(placed, axis=1, keepdims=True), 1e-9)
        logits = placed @ self.experts_RE / _TEMPERATURE
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: Array = weights / weights.sum(axis=1, keepdims=True)
        return shares


def _train(inputs: Array, scores: Array, seed: int) -> tuple[Array, Array, Array]:
    """The tower with its bias, and the experts at unit length. The bias is what all questions share: features are
    centred, and without it no expert could be better than others on average. A tenth of the questions says when
    to stop."""
    import torch
    from torch.nn.functional import normalize

    x_QD, y_QE = torch.from_numpy(inputs), torch.from_numpy(scores.astype(np.float32))
    cluster_Q = torch.from_numpy(_clusters(inputs, seed))
    kept, held = (torch.from_numpy(rows) for rows in split_folds(len(inputs), seed, folds=10)[0])
    generator = torch.Generator().manual_seed(seed)
    weights = [
        (torch.randn(inputs.shape[1], RANK, generator=generator) / inputs.shape[1] ** 0.5).requires_grad_(),
        (torch.randn(RANK, generator=generator) / RANK**0.5).requires_grad_(),
        (torch.randn(RANK, scores.shape[1], generator=generator) / RANK**0.5).requires_grad_(),
    ]
    optimiser = torch.optim.AdamW(weights, lr=3e-3, weight_decay=_DECAY)
    best, best_score, waited = [w.detach().clone() for w in weights], -1.0, 0
    for _ in range(_EPOCHS):
        for rows in torch.split(kept[torch.randperm(len(kept), generator=generator)], _BATCH):
            optimiser.zero_grad()
            _loss(weights, x_QD[rows], y_QE[rows], cluster_Q[rows], generator).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            chosen = (normalize(x_QD[held] @ weights[0] + weights[1], dim=1) @ normalize(weights[2], dim=0)).argmax(
                dim=1
            )
            score = float(y_QE[held, chosen].mean())
        waited = 0 if score > best_score else waited + 1
        if score > best_score:
            best, best_score = [w.detach().clone() for w in weights], score
        if waited == _PATIENCE:
            break
    return best[0].numpy(), best[1].numpy(), normalize(best[2], dim=0).numpy()


def _loss(
    weights: "list[Tensor]", x_QD: "Tensor", y_QE: "Tensor", cluster_Q: "Tensor", generator: "Generator"
) -> "Tensor":
    from torch.nn.functional import normalize

    placed_QR = normalize(x_QD @ weights[0] + weights[1], dim=1)
    logits_QE = placed_QR @ normalize(weights[2], dim=0) / _TEMPERATURE
    return _between_experts(logits_QE, y_QE) + _SAMPLE_WEIGHT * _between_questions(placed_QR, cluster_Q, generator)


def _between_experts(logits_QE: "Tensor", y_QE: "Tensor") -> "Tensor":
    """Each expert that did well against all that did not; a question that all or none answered says nothing."""
    import torch

    wrong = torch.logsumexp(logits_QE + torch.log((1 - y_QE).clamp_min(1e-9)), dim=1, keepdim=True)
    each = torch.nn.functional.softplus(wrong - logits_QE)
    telling = ((y_QE.amax(dim=1) > y_QE.amin(dim=1)).float()[:, None] * y_QE).clamp_min(0)
    return (each * telling).sum() / telling.sum().clamp_min(1)


def _between_questions(placed_QR: "Tensor", cluster_Q: "Tensor", generator: "Generator") -> "Tensor":
    """A question of the same cluster, drawn from the batch, against some of other clusters."""
    import torch

    size = len(placed_QR)
    order = torch.randperm(size, generator=generator)
    same = cluster_Q[:, None] == cluster_Q[order][None]
    has = same.any(dim=1) & ~same.all(dim=1)
    # Gathered from all cosines, for the gradient of rows taken by number is summed in any order on several threads.
    alike_QQ = placed_QR @ placed_QR.T / _TEMPERATURE
    near = alike_QQ.gather(1, order[same.float().argmax(dim=1)][:, None])[:, 0]
    others = order[torch.randint(size, (size, _OTHERS), generator=generator)]
    far = alike_QQ.gather(1, others)
    far = far.masked_fill(cluster_Q[others] == cluster_Q[:, None], -1e4)
    loss = torch.nn.functional.softplus(torch.logsumexp(far, dim=1) - near)
    return (loss * has).sum() / has.sum().clamp_min(1)


def _clusters(inputs: Array, seed: int) -> Array:
    from sklearn.cluster import KMeans

    count = min(CLUSTERS, max(1, len(inputs) // 8))
    labels: Array = KMeans(count, n_init=1, random_state=seed).fit(inputs).labels_.astype(np.int64)
    return labels
