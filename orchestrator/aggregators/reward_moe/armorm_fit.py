"""Fitting an ArmoRM: ridges, debiasing, then the gate by Bradley-Terry with everything else frozen.

Legend: N answers, P prompts, D features, W width of the prompt's embedding, O objectives, K pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.aggregators.reward_moe.armorm import ArmoRM, Gate, uniform_gate
from orchestrator.aggregators.reward_moe.bradley_terry import (
    Schedule,
    deterministic,
    held_out_pairs,
    loss_of,
    minimise,
)
from orchestrator.aggregators.reward_moe.corpus import Corpus
from orchestrator.aggregators.reward_moe.debias import debias
from orchestrator.aggregators.reward_moe.ridge import fit_heads
from orchestrator.aggregators.reward_moe.samples import VERBOSITY
from routers.records import Array

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """The paper's gate has three hidden layers of 1,024 and tau 10; on an 8B model's hidden states. Ours is smaller.

    ``debias_in_training`` False trains the gate on raw rewards, as the released trainer does, and applies T afterwards.
    """

    hidden: tuple[int, ...] = (64,)
    dropout: float = 0.3
    tau: float = 1.0
    released_softmax: bool = False
    debias_in_training: bool = True
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=300, lr=2e-3, weight_decay=0.1, check_every=25))


def fit_rewards(corpus: Corpus, *, seed: int) -> ArmoRM:
    """The objectives with a uniform gate."""
    inputs = corpus.inputs
    heads = fit_heads(inputs.features_ND, corpus.labels_NO, inputs.prompt_N, seed=seed)
    raw_NO = inputs.features_ND @ heads.weight_OD.T
    real = np.flatnonzero(corpus.real_N)
    verbosity = corpus.objectives.index(VERBOSITY) if VERBOSITY in corpus.objectives else None
    transform_OO = debias(raw_NO[real], verbosity)
    spread_O = (raw_NO[real] @ transform_OO).std(axis=0)
    return ArmoRM(
        objectives=corpus.objectives,
        weight_OD=heads.weight_OD,
        transform_OO=transform_OO,
        scale_O=np.where(spread_O > 1e-6, 1 / np.maximum(spread_O, 1e-6), 1.0).astype(np.float32),
        gate=uniform_gate(inputs.prompts_PW.shape[1], len(corpus.objectives)),
    )


def fit_armorm(
    corpus: Corpus,
    *,
    seed: int,
    base: ArmoRM | None = None,
    settings: GateSettings | None = None,
    on_advance: Callable[[int], None] = lambda _: None,
) -> ArmoRM:
    """``base`` are the objectives, where they are fitted already."""
    base, settings = base or fit_rewards(corpus, seed=seed), settings or GateSettings()
    transform_OO = base.transform_OO if settings.debias_in_training else np.eye(len(base.objectives), dtype=np.float32)
    gate = fit_gate(
        replace(base, transform_OO=transform_OO).rewards(corpus.inputs.features_ND),
        corpus.inputs.prompts_PW,
        corpus.inputs.prompt_N,
        corpus.pairs_K2,
        settings,
        seed=seed,
        weights_K=corpus.weights_K,
        on_advance=on_advance,
    )
    return replace(base, gate=gate)


def fit_gate(
    rewards_NO: Array,
    prompts_PW: Array,
    prompt_N: Array,
    pairs_K2: Array,
    settings: GateSettings,
    *,
    seed: int,
    weights_K: Array | None = None,
    on_advance: Callable[[int], None] = lambda _: None,
) -> Gate:
    """Bradley-Terry on the pairs; only the gate learns. Both answers of a pair have one prompt and so one set of
    weights: with the softmax of the released code the gate learns nothing but its scale."""
    import torch

    prompt_K = prompt_N[pairs_K2[:, 0]]
    with deterministic(seed):
        layers = _layers(prompts_PW.shape[1], (*settings.hidden, rewards_NO.shape[1]))
        scale = torch.ones((), requires_grad=True)
        prompts, rewards = torch.from_numpy(prompts_PW), torch.from_numpy(rewards_NO)
        gaps_KO = rewards[pairs_K2[:, 0]] - rewards[pairs_K2[:, 1]]
        train, held_out = held_out_pairs(prompt_K, 0.1, seed)

        def loss(rows: Array) -> torch.Tensor:
            logits = _forward(layers, prompts[prompt_K[rows]], settings.dropout if torch.is_grad_enabled() else 0.0)
            if settings.released_softmax:
                weights = torch.full_like(logits, 0.5)
            else:
                weights = torch.softmax(logits / settings.tau, dim=-1)
            gaps = (scale * weights * gaps_KO[rows]).sum(dim=-1)
            return loss_of(gaps, torch.zeros_like(gaps))

        parameters = [*(p for layer in layers for p in layer.parameters()), scale]
        minimise(parameters, loss, train, held_out, settings.schedule, weights=weights_K, on_advance=on_advance)
    return Gate(
        weights=tuple(layer.weight.detach().numpy().T.copy() for layer in layers),
        biases=tuple(layer.bias.detach().numpy().copy() for layer in layers),
        tau=settings.tau,
        logit_scale=float(scale.detach()),
        released=settings.released_softmax,
    )


def _layers(width: int, sizes: tuple[int, ...]) -> "list[torch.nn.Linear]":
    import torch

    return [torch.nn.Linear(i, o) for i, o in zip((width, *sizes), sizes, strict=False)]


def _forward(layers: "list[torch.nn.Linear]", prompts: "torch.Tensor", dropout: float) -> "torch.Tensor":
    import torch

    hidden = prompts
    for layer in layers[:-1]:
        hidden = torch.dropout(torch.relu(layer(hidden)), dropout, dropout > 0)
    return layers[-1](hidden)  # type: ignore[no-any-return]
