"""DMoERM: one category's reward answers, and inside it several capabilities, fused (arXiv 2403.01197).

Outside, a classifier reads the prompt and picks the category with the highest score. Inside, a backbone shared by the
category carries a low-rank change (LoRA) for each capability; their hidden states, not their scores, are joined:

    z_c = tanh(f (A + A_c B_c) + b);  s = w2 . PReLU(W1 [z_1; ...; z_n] + b1) + b2

A category with too few data has no inner layer: there the base head, fitted on all categories, answers.
Rewards of different categories have different scales. All answers to one prompt share its route, so that no two of
them are ever compared across categories.

Legend: N answers, P prompts, D features, H hidden, R rank of a change, C capabilities.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from orchestrator.aggregators.reward_moe.inputs import Inputs
from routers.questions import Labels, Questions
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The backbone with its value head."""

    weight_DH: Array
    bias_H: Array
    value_H: Array

    def hidden(self, features_ND: Array) -> Array:
        found: Array = np.tanh(features_ND @ self.weight_DH + self.bias_H)
        return found

    def score(self, features_ND: Array) -> Array:
        found: Array = self.hidden(features_ND) @ self.value_H
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """``down_CDR`` and ``up_CRH`` are the capabilities' changes of the base; the rest is the fusion."""

    base: Base
    down_CDR: Array
    up_CRH: Array
    fuse_JH: Array
    fuse_bias_H: Array
    slope: float
    out_H: Array
    out_bias: float

    def joined(self, features_ND: Array) -> Array:
        """[z_1; ...; z_n], N x (C H)."""
        plain_NH = features_ND @ self.base.weight_DH + self.base.bias_H
        changed = [
            np.tanh(plain_NH + (features_ND @ down) @ up) for down, up in zip(self.down_CDR, self.up_CRH, strict=True)
        ]
        return np.concatenate(changed, axis=1)

    def score(self, features_ND: Array) -> Array:
        mixed_NH = self.joined(features_ND) @ self.fuse_JH + self.fuse_bias_H
        found: Array = np.where(mixed_NH > 0, mixed_NH, self.slope * mixed_NH) @ self.out_H + self.out_bias
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class DMoERM:
    """``route`` names every category; those of them that are not in ``inner`` use ``base``."""

    route: Labels
    base: Base
    inner: Mapping[str, Inner]

    @property
    def features(self) -> int:
        return len(self.base.weight_DH)

    def categories(self, prompts_PW: Array) -> list[str]:
        silent = Questions(vectors_QW=prompts_PW, tasks=(None,) * len(prompts_PW))
        return [self.route.names[i] for i in self.route.of(silent).argmax(axis=1)]

    def score(self, inputs: Inputs) -> tuple[Array, list[Mapping[str, float]]]:
        """What a reward is made of: the route it took, and beside it what the base head would have said."""
        routes = self.categories(inputs.prompts_PW)
        base_N = self.base.score(inputs.features_ND)
        values_N = base_N.copy()
        own = np.array(routes, object)[inputs.prompt_N]
        for name, inner in self.inner.items():
            rows = np.flatnonzero(own == name)
            if len(rows):
                values_N[rows] = inner.score(inputs.features_ND[rows])
        parts = [
            {f"route:{route}" if route in self.inner else f"base head for {route}": float(value), "base": float(base)}
            for route, value, base in zip(own, values_N, base_N, strict=True)
        ]
        return values_N, list(parts)
