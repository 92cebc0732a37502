"""DMoERM: its phases, its loss, its filter for labels, and the made-up world of its card.

Legend: N answers, K pairs.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from orchestrator.aggregators.reward_moe.bradley_terry import Schedule, ranking_loss
from orchestrator.aggregators.reward_moe.dmoerm import DMoERM
from orchestrator.aggregators.reward_moe.dmoerm_fit import (
    Category,
    DMoERMSettings,
    fit_base,
    fit_capability,
    fit_fusion,
    fit_inner,
    with_changes,
)
from orchestrator.aggregators.reward_moe.inputs import Inputs
from orchestrator.aggregators.reward_moe.swap import swap_filter
from routers.questions import Labels, Questions

QUICK = Schedule(steps=30, lr=1e-2, check_every=10, batch=128)
SETTINGS = DMoERMSettings(hidden=8, rank=2, base=QUICK, own=QUICK, capability=QUICK, fusion=QUICK)


def category(pairs=200, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2 * pairs, 8)).astype(np.float32)
    a = np.arange(0, 2 * pairs, 2)
    better = np.where(features[a, 0] > features[a + 1, 0], a, a + 1)
    own = np.where(features[a, 1] > features[a + 1, 1], a, a + 1)
    return Category(
        features_ND=features,
        prompt_N=np.repeat(np.arange(pairs), 2),
        pairs_K2=np.stack([better, 2 * a + 1 - better], axis=1),
        capabilities={"second": np.stack([own, 2 * a + 1 - own], axis=1)},
    )


def arrays(thing):
    return {name: getattr(thing, name).copy() for name in ("weight_DH", "bias_H", "value_H")}


def test_a_change_that_has_learned_nothing_changes_nothing():
    own = category()
    base = fit_base(own, None, SETTINGS, seed=0)
    still = replace(SETTINGS, capability=Schedule(steps=1, lr=0.0, check_every=1))
    down, up = fit_capability(own, own.capabilities["second"], base, still, seed=1)
    assert (up == 0).all()
    assert down.any()
    inner = with_changes(base, [(down, up), (down, up)])
    assert inner.joined(own.features_ND)[:, :8] == pytest.approx(base.hidden(own.features_ND))
    assert inner.score(own.features_ND) == pytest.approx(base.score(own.features_ND), abs=1e-5)


def test_capabilities_leave_the_base_as_it_is_and_fusion_leaves_both():
    own = category()
    base = fit_base(own, None, SETTINGS, seed=0)
    before = arrays(base)
    down, up = fit_capability(own, own.capabilities["second"], base, SETTINGS, seed=1)
    assert up.any()
    inner = with_changes(base, [(down, up)])
    kept = inner.down_CDR.copy(), inner.up_CRH.copy()
    fused = fit_fusion(own, inner, SETTINGS, seed=0)
    assert all((getattr(fused.base, name) == value).all() for name, value in before.items())
    assert (fused.down_CDR == kept[0]).all()
    assert (fused.up_CRH == kept[1]).all()
    assert not np.array_equal(fused.fuse_JH, inner.fuse_JH)
    assert not np.array_equal(fused.out_H, inner.out_H)
    assert fused.slope != inner.slope


def test_a_capability_learns_its_own_labels():
    own = category(600)
    base = fit_base(own, None, SETTINGS, seed=0)
    longer = replace(SETTINGS, capability=Schedule(steps=150, lr=2e-2, check_every=25, batch=256))
    inner = with_changes(base, [fit_capability(own, own.capabilities["second"], base, longer, seed=1)])
    change = inner.joined(own.features_ND) - base.hidden(own.features_ND)
    explained = np.abs([np.corrcoef(change[:, h], own.features_ND[:, 1])[0, 1] for h in range(8)])
    assert explained.max() > 0.5


def test_loss_of_a_ranking_is_the_mean_over_its_pairs():
    assert float(ranking_loss(torch.tensor([2.0, 1.0, 0.0]))) == pytest.approx(0.2512, abs=1e-4)
    assert float(ranking_loss(torch.tensor([5.0]))) == 0


def test_a_category_without_an_inner_layer_uses_the_base_head():
    own = category()
    base = fit_base(own, None, SETTINGS, seed=0)
    inner = with_changes(base, [(np.ones((8, 2), np.float32), np.ones((2, 8), np.float32))])
    prompts = np.eye(2, dtype=np.float32)
    route = Labels.fit(Questions(vectors_QW=np.repeat(prompts, 20, axis=0), tasks=("many",) * 20 + ("few",) * 20))
    model = DMoERM(route=route, base=base, inner={"many": inner})
    assert model.categories(prompts) == ["many", "few"]
    features = own.features_ND[:4]
    values, parts = model.score(Inputs(features_ND=features, prompts_PW=prompts, prompt_N=np.array([0, 0, 1, 1])))
    assert values[:2] == pytest.approx(inner.score(features[:2]))
    assert values[2:] == pytest.approx(base.score(features[2:]))
    assert list(parts[0]) == ["route:many", "base"]
    assert list(parts[2]) == ["base head for few", "base"]


PAIRS = [("prompt", "good", "bad"), ("prompt", "bad", "good"), ("prompt", "same", "same")]


async def test_a_judge_who_likes_a_place_teaches_nothing():
    async def always_first(prompt, a, b):
        return "first"

    judged = await swap_filter(always_first, PAIRS)
    assert judged.winners == (None, None, None)
    assert judged.dropped == 1


async def test_a_judge_who_agrees_with_himself_is_kept():
    async def honest(prompt, a, b):
        return "tie" if a == b else "first" if a == "good" else "second"

    judged = await swap_filter(honest, PAIRS)
    assert judged.winners == (0, 1, None)
    assert judged.dropped == pytest.approx(1 / 3)


# The card's world: a different non-linear mix of three capabilities in each category; people err in 30 % of pairs, the
# capabilities' judge in 5 %.
MIXES = (
    lambda c: 1.5 * np.tanh(2 * c[:, 0]) + 2 * np.minimum(c[:, 1], 0),
    lambda c: 2 * np.minimum(c[:, 1], c[:, 2]),
    lambda c: np.tanh(2 * c[:, 2]) - 1.5 * np.abs(c[:, 0]),
)
LATENT = np.random.default_rng(7).normal(size=(8, 3)) / 8**0.5


def toy_category(mix, rng, pairs=2000):
    features = rng.normal(size=(2 * pairs, 8)).astype(np.float32)
    latent = features @ LATENT

    def labelled(values, flipped):
        a = np.arange(0, 2 * pairs, 2)
        won = np.where((values[a] > values[a + 1]) != (rng.random(pairs) < flipped), a, a + 1)
        return np.stack([won, 2 * a + 1 - won], axis=1)

    return Category(
        features_ND=features,
        prompt_N=np.repeat(np.arange(pairs), 2),
        pairs_K2=labelled(mix(latent), 0.3),
        capabilities={str(j): labelled(latent[:, j], 0.05) for j in range(3)},
    )


def toy_accuracy(score, mix):
    features = np.random.default_rng(99).normal(size=(8000, 8)).astype(np.float32)
    truth, found = mix(features @ LATENT), score(features)
    return np.mean((truth[::2] > truth[1::2]) == (found[::2] > found[1::2]))


@pytest.mark.slow
def test_a_reward_for_each_category_beats_one_for_all():
    """That the inner layer adds 2 points more, as the card expects, was not seen: docs/rewards.md."""
    rng, quick = np.random.default_rng(0), {"check_every": 25, "batch": 512}
    settings = DMoERMSettings(
        hidden=16,
        rank=2,
        base=Schedule(steps=300, lr=1e-2, **quick),
        own=Schedule(steps=200, lr=5e-3, **quick),
        capability=Schedule(steps=200, lr=1e-2, **quick),
        fusion=Schedule(steps=200, lr=5e-3, weight_decay=2.0, **quick),
    )
    own = [toy_category(mix, rng) for mix in MIXES]
    every = Category(
        features_ND=np.concatenate([c.features_ND for c in own]),
        prompt_N=np.concatenate([c.prompt_N + 2000 * k for k, c in enumerate(own)]),
        pairs_K2=np.concatenate([c.pairs_K2 + 4000 * k for k, c in enumerate(own)]),
        capabilities={},
    )
    single = fit_base(every, None, settings, seed=0)
    inner = [fit_inner(c, single, settings, seed=0) for c in own]
    one = np.mean([toy_accuracy(single.score, mix) for mix in MIXES])
    outer = np.mean([toy_accuracy(i.base.score, mix) for i, mix in zip(inner, MIXES, strict=True)])
    both = np.mean([toy_accuracy(i.score, mix) for i, mix in zip(inner, MIXES, strict=True)])
    assert outer > one + 0.02
    assert both > one + 0.02
