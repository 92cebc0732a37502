"""A small network of two towers: a question's features and an expert's embedding meet in a dot product.

Trained with torch; the forward pass needs numpy alone. A tenth of the training questions says when to stop.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from routers.learned.base import Training, split_folds
from routers.learned.logistic import log_odds, sigmoid
from routers.questions import Design, Questions
from routers.records import Array

if TYPE_CHECKING:
    from torch import Generator, Tensor

HIDDEN, RANK = 64, 16
_EPOCHS, _PATIENCE, _BATCH = 30, 4, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    design: Design
    inner_DH: Array
    inner_bias_H: Array
    outer_HR: Array
    experts_RE: Array
    bias_E: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        design = Design.fit(training.questions)
        arrays = _train(design.features(training.questions), training.scores_QE, training.seed)
        inner, inner_bias, outer, experts, bias = arrays
        return cls(
            design=design, inner_DH=inner, inner_bias_H=inner_bias, outer_HR=outer, experts_RE=experts, bias_E=bias
        )

    def predict(self, questions: Questions) -> Array:
        hidden = np.maximum(self.design.features(questions) @ self.inner_DH + self.inner_bias_H, 0)
        return sigmoid(hidden @ self.outer_HR @ self.experts_RE + self.bias_E)


def _train(inputs: Array, scores: Array, seed: int) -> list[Array]:
    import torch

    x_QD, y_QE = torch.from_numpy(inputs), torch.from_numpy(scores.astype(np.float32))
    kept, held = (torch.from_numpy(rows) for rows in split_folds(len(inputs), seed, folds=10)[0])
    generator = torch.Generator().manual_seed(seed)
    weights = [
        _random(generator, inputs.shape[1], HIDDEN),
        torch.zeros(HIDDEN),
        _random(generator, HIDDEN, RANK),
        _random(generator, RANK, scores.shape[1]),
        torch.from_numpy(log_odds(scores.mean(axis=0)).astype(np.float32)),
    ]
    parameters = [w.requires_grad_() for w in weights]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    best, best_loss, waited = [w.detach().clone() for w in weights], np.inf, 0
    for _ in range(_EPOCHS):
        for rows in torch.split(kept[torch.randperm(len(kept), generator=generator)], _BATCH):
            optimiser.zero_grad()
            kept_mask = (torch.rand(len(rows), HIDDEN, generator=generator) > 0.5).float() * 2
            _loss(weights, x_QD[rows], y_QE[rows], kept_mask).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            loss = float(_loss(weights, x_QD[held], y_QE[held], None))
        waited = 0 if loss < best_loss else waited + 1
        if loss < best_loss:
            best, best_loss = [w.detach().clone() for w in weights], loss
        if waited == _PATIENCE:
            break
    return [w.numpy() for w in best]


def _loss(weights: "list[Tensor]", x_QD: "Tensor", y_QE: "Tensor", dropout_QH: "Tensor | None") -> "Tensor":
    from torch.nn.functional import binary_cross_entropy_with_logits

    inner, inner_bias, outer, experts, bias = weights
    hidden = (x_QD @ inner + inner_bias).relu()
    if dropout_QH is not None:
        hidden = hidden * dropout_QH
    loss: Tensor = binary_cross_entropy_with_logits(hidden @ outer @ experts + bias, y_QE)
    return loss


def _random(generator: "Generator", rows: int, columns: int) -> "Tensor":
    import torch

    drawn: Tensor = torch.randn(rows, columns, generator=generator) / rows**0.5
    return drawn
