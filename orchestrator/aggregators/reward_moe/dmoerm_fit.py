"""Fitting a DMoERM in its three phases.

Phase 1: backbone and value head, on 60 % of the pairs; first on all categories (what a language model brings along
elsewhere), then on each. Phase 2: for each capability a low-rank change, zero at the start, with a value head of its
own that starts as the base's; the base is frozen. Phase 3: everything is frozen but the fusion, which learns from the
other 40 %.

Legend: N answers, D features, H hidden, R rank, K pairs, C capabilities.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from experts.errors import ConfigError
from orchestrator.aggregators.reward_moe.bradley_terry import (
    Schedule,
    deterministic,
    held_out_pairs,
    loss_of,
    minimise,
)
from orchestrator.aggregators.reward_moe.corpus import Corpus
from orchestrator.aggregators.reward_moe.dmoerm import Base, DMoERM, Inner
from orchestrator.aggregators.reward_moe.samples import VERBOSITY
from routers.questions import Labels, Questions
from routers.records import Array

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DMoERMSettings:
    hidden: int = 32
    rank: int = 4
    fusion_share: float = 0.4
    least_pairs: int = 400
    base: Schedule = field(default_factory=lambda: Schedule(steps=500, lr=2e-3, weight_decay=0.1))
    own: Schedule = field(
        default_factory=lambda: Schedule(steps=100, batch=512, lr=1e-3, weight_decay=0.1, check_every=25)
    )
    capability: Schedule = field(
        default_factory=lambda: Schedule(steps=100, batch=512, lr=2e-3, weight_decay=0.1, check_every=25)
    )
    fusion: Schedule = field(
        default_factory=lambda: Schedule(steps=100, batch=512, lr=1e-3, weight_decay=0.3, check_every=25)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """What one category learns from: rows of ``features_ND``, winner first; ``capabilities`` by name."""

    features_ND: Array
    prompt_N: Array
    pairs_K2: Array
    capabilities: Mapping[str, Array]
    weights_K: Array | None = None


def fit_dmoerm(
    corpus: Corpus, *, seed: int, settings: DMoERMSettings | None = None, on_advance: Advance = lambda _: None
) -> DMoERM:
    """Capabilities are the corpus's objectives, compared answer by answer within a prompt."""
    settings, inputs = settings or DMoERMSettings(), corpus.inputs
    if not len(corpus.pairs_K2):
        raise ConfigError("There is no pair to learn from: every answer to a prompt has the same grade.")
    route = Labels.fit(Questions(vectors_QW=inputs.prompts_PW, tasks=corpus.categories))
    everything = Category(
        features_ND=inputs.features_ND,
        prompt_N=inputs.prompt_N,
        pairs_K2=corpus.pairs_K2,
        capabilities={},
        weights_K=corpus.weights_K,
    )
    base = fit_base(everything, None, settings, seed=seed, on_advance=on_advance)
    capabilities = capability_pairs(corpus)
    own_N = np.array(corpus.categories, object)[inputs.prompt_N]
    inner = {}
    for name in route.names:
        category = Category(
            features_ND=inputs.features_ND,
            prompt_N=inputs.prompt_N,
            pairs_K2=_within(corpus.pairs_K2, own_N == name),
            capabilities={c: rows for c, p in capabilities.items() if len(rows := _within(p, own_N == name)) >= 50},
        )
        if len(category.pairs_K2) < settings.least_pairs or not category.capabilities:
            log.info("category %s has %d pairs: the base head answers", name, len(category.pairs_K2))
            continue
        inner[name] = fit_inner(category, base, settings, seed=seed, on_advance=on_advance)
    return DMoERM(route=route, base=base, inner=inner)


def capability_pairs(corpus: Corpus, *, margin: float = 0.2, most: int = 20_000, seed: int = 0) -> dict[str, Array]:
    """Which of two answers to a prompt is better in an objective, by at least ``margin`` of its scale; neighbours in a
    panel only, so that their number grows with the answers. A shorter answer counts as the more concise one."""
    rng, prompt_N = np.random.default_rng(seed), corpus.inputs.prompt_N
    a = np.arange(len(prompt_N) - 1)
    a = a[(prompt_N[a] == prompt_N[a + 1]) & corpus.real_N[a] & corpus.real_N[a + 1]]
    found = {}
    for column, name in enumerate(corpus.objectives):
        label_N = -2 * corpus.labels_NO[:, column] if name == VERBOSITY else corpus.labels_NO[:, column]
        gap = label_N[a] - label_N[a + 1]
        better = np.concatenate([a[gap > margin], a[gap < -margin] + 1])
        worse = np.concatenate([a[gap > margin] + 1, a[gap < -margin]])
        pairs = np.stack([better, worse], axis=1)
        found["conciseness" if name == VERBOSITY else name] = pairs[rng.permutation(len(pairs))[:most]]
    return found


def _within(pairs_K2: Array, rows_N: Array) -> Array:
    kept: Array = pairs_K2[rows_N[pairs_K2[:, 0]]]
    return kept


def fit_base(
    category: Category,
    start: Base | None,
    settings: DMoERMSettings,
    *,
    seed: int,
    on_advance: Advance = lambda _: None,
) -> Base:
    """Phase 1. ``start`` is the base of all categories, None for that one itself."""
    import torch

    rows, _ = held_out_pairs(category.prompt_N[category.pairs_K2[:, 0]], settings.fusion_share, seed)
    with deterministic(seed) as random:
        width = category.features_ND.shape[1]
        given = start or Base(
            weight_DH=(torch.randn(width, settings.hidden, generator=random) / width**0.5).numpy(),
            bias_H=np.zeros(settings.hidden, np.float32),
            value_H=(torch.randn(settings.hidden, generator=random) / settings.hidden**0.5).numpy(),
        )
        weight, bias, value = (_leaf(a) for a in (given.weight_DH, given.bias_H, given.value_H))

        def score(features: torch.Tensor) -> torch.Tensor:
            return torch.tanh(features @ weight + bias) @ value

        schedule = settings.base if start is None else settings.own
        weights_K = None if category.weights_K is None else category.weights_K[rows]
        _learn(category, category.pairs_K2[rows], [weight, bias, value], score, schedule, seed, on_advance, weights_K)
    return Base(weight_DH=_array(weight), bias_H=_array(bias), value_H=_array(value))


def fit_inner(
    category: Category, start: Base, settings: DMoERMSettings, *, seed: int, on_advance: Advance = lambda _: None
) -> Inner:
    """All three phases of one category."""
    base = fit_base(category, start, settings, seed=seed, on_advance=on_advance)
    changes = [
        fit_capability(category, pairs, base, settings, seed=seed + 1 + place, on_advance=on_advance)
        for place, pairs in enumerate(category.capabilities.values())
    ]
    return fit_fusion(category, with_changes(base, changes), settings, seed=seed, on_advance=on_advance)


def fit_capability(
    category: Category,
    pairs_K2: Array,
    base: Base,
    settings: DMoERMSettings,
    *,
    seed: int,
    on_advance: Advance = lambda _: None,
) -> tuple[Array, Array]:
    """Phase 2: the change of one capability, down (D x R) and up (R x H). Its value head is dropped."""
    import torch

    with deterministic(seed) as random:
        width, hidden = base.weight_DH.shape
        weight, bias = torch.from_numpy(base.weight_DH), torch.from_numpy(base.bias_H)
        down = (torch.randn(width, settings.rank, generator=random) / width**0.5).requires_grad_()
        up, value = torch.zeros(settings.rank, hidden, requires_grad=True), _leaf(base.value_H)

        def score(features: torch.Tensor) -> torch.Tensor:
            return torch.tanh(features @ weight + bias + (features @ down) @ up) @ value

        _learn(category, pairs_K2, [down, up, value], score, settings.capability, seed, on_advance)
    return _array(down), _array(up)


def with_changes(base: Base, changes: Sequence[tuple[Array, Array]]) -> Inner:
    """An inner layer whose fusion has yet to learn: it starts as the mean of its capabilities under the base's head."""
    count, hidden = len(changes), len(base.value_H)
    return Inner(
        base=base,
        down_CDR=np.stack([down for down, _ in changes]),
        up_CRH=np.stack([up for _, up in changes]),
        fuse_JH=np.tile(np.eye(hidden, dtype=np.float32) / count, (count, 1)),
        fuse_bias_H=np.zeros(hidden, np.float32),
        slope=1.0,
        out_H=base.value_H.copy(),
        out_bias=0.0,
    )


def fit_fusion(
    category: Category, inner: Inner, settings: DMoERMSettings, *, seed: int, on_advance: Advance = lambda _: None
) -> Inner:
    """Phase 3, on the pairs that phase 1 did not see."""
    import torch

    _, rows = held_out_pairs(category.prompt_N[category.pairs_K2[:, 0]], settings.fusion_share, seed)
    pairs_K2 = category.pairs_K2[rows]
    used, places = np.unique(pairs_K2, return_inverse=True)
    joined = Category(
        features_ND=inner.joined(category.features_ND[used]).astype(np.float32),
        prompt_N=category.prompt_N[used],
        pairs_K2=places.reshape(pairs_K2.shape),
        capabilities={},
    )
    with deterministic(seed):
        fuse, bias, out = (_leaf(a) for a in (inner.fuse_JH, inner.fuse_bias_H, inner.out_H))
        slope, out_bias = _leaf(inner.slope), _leaf(inner.out_bias)

        def score(features: torch.Tensor) -> torch.Tensor:
            mixed = features @ fuse + bias
            return torch.where(mixed > 0, mixed, slope * mixed) @ out + out_bias

        parameters = [fuse, bias, slope, out, out_bias]
        _learn(joined, joined.pairs_K2, parameters, score, settings.fusion, seed, on_advance)
    return Inner(
        base=inner.base,
        down_CDR=inner.down_CDR,
        up_CRH=inner.up_CRH,
        fuse_JH=_array(fuse),
        fuse_bias_H=_array(bias),
        slope=float(slope.detach()),
        out_H=_array(out),
        out_bias=float(out_bias.detach()),
    )


def _learn(
    category: Category,
    pairs_K2: Array,
    parameters: "Sequence[torch.Tensor]",
    score: "Callable[[torch.Tensor], torch.Tensor]",
    schedule: Schedule,
    seed: int,
    on_advance: Advance,
    weights_K: Array | None = None,
) -> None:
    import torch

    features = torch.from_numpy(category.features_ND)
    winners, losers = torch.from_numpy(np.ascontiguousarray(pairs_K2.T))
    train, held_out = held_out_pairs(category.prompt_N[pairs_K2[:, 0]], 0.15, seed)

    def loss(rows: Array) -> torch.Tensor:
        return loss_of(score(features[winners[rows]]), score(features[losers[rows]]))

    minimise(parameters, loss, train, held_out, schedule, weights=weights_K, on_advance=on_advance)


def _leaf(array: "Array | float") -> "torch.Tensor":
    import torch

    return torch.tensor(array, dtype=torch.float32).requires_grad_()


def _array(tensor: "torch.Tensor") -> Array:
    found: Array = tensor.detach().numpy().astype(np.float32)
    return found
