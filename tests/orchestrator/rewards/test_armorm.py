"""ArmoRM: the tests of its card, on made-up objectives.

Legend: N answers, P prompts, O objectives, D features, W width of the prompt's embedding.
"""

import numpy as np
import pytest

from experts.errors import ConfigError
from orchestrator.aggregators.reward_moe.armorm import ArmoRM, Gate, uniform_gate
from orchestrator.aggregators.reward_moe.armorm_fit import GateSettings, fit_gate
from orchestrator.aggregators.reward_moe.bradley_terry import Schedule
from orchestrator.aggregators.reward_moe.debias import GRID, debias, spearman
from orchestrator.aggregators.reward_moe.inputs import Inputs
from orchestrator.aggregators.reward_moe.ridge import fit_heads

WIDTH, OBJECTIVES, HIDDEN = 8, 6, 16


def world(prompts, seed):
    """Two clusters of prompts; in each another objective is what people want. Pairs are labelled by Bradley-Terry."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(1)
    centres, heads = fixed.normal(size=(2, WIDTH)), fixed.normal(size=(OBJECTIVES, HIDDEN)) / HIDDEN**0.5
    cluster = rng.integers(2, size=prompts)
    prompts_PW = (centres[cluster] + 0.3 * rng.normal(size=(prompts, WIDTH))).astype(np.float32)
    features_ND = rng.normal(size=(2 * prompts, HIDDEN)).astype(np.float32)
    true_NO = features_ND @ heads.T
    a = np.arange(0, 2 * prompts, 2)
    gap = 4 * (true_NO[a, cluster] - true_NO[a + 1, cluster])
    first = rng.random(prompts) < 1 / (1 + np.exp(-gap))
    pairs = np.stack([np.where(first, a, a + 1), np.where(first, a + 1, a)], axis=1)
    return prompts_PW, features_ND, true_NO, np.repeat(np.arange(prompts), 2), pairs, cluster


@pytest.fixture(scope="module")
def fitted():
    prompts_PW, features_ND, true_NO, prompt_N, pairs, _ = world(3000, 0)
    labels = true_NO + 0.1 * np.random.default_rng(2).normal(size=true_NO.shape)
    heads = fit_heads(features_ND, labels.astype(np.float32), prompt_N, seed=0)
    settings = GateSettings(hidden=(32,), dropout=0.0, schedule=Schedule(steps=250, batch=512, lr=1e-2))
    rewards = (features_ND @ heads.weight_OD.T).astype(np.float32)
    gate = fit_gate(rewards, prompts_PW, prompt_N, pairs, settings, seed=0)
    one = np.ones(OBJECTIVES, np.float32)
    names = tuple("abcdef")
    return ArmoRM(
        objectives=names,
        weight_OD=heads.weight_OD,
        transform_OO=np.eye(OBJECTIVES, dtype=np.float32),
        scale_O=one,
        gate=gate,
    )


def accuracy(scores, pairs):
    return float(np.mean(scores[pairs[:, 0]] > scores[pairs[:, 1]]))


def test_gate_recovers_what_each_cluster_wants(fitted):
    prompts_PW, features_ND, true_NO, prompt_N, pairs, cluster = world(3000, 7)
    inputs = Inputs(features_ND=features_ND, prompts_PW=prompts_PW, prompt_N=prompt_N)
    weights = fitted.gate(prompts_PW) / fitted.gate.logit_scale
    for which in (0, 1):
        assert weights[cluster == which, which].mean() > 0.9
    gate = accuracy(fitted.score(inputs)[0], pairs)
    bayes = accuracy(true_NO[np.arange(len(prompt_N)), cluster[prompt_N]], pairs)
    uniform = accuracy(true_NO.mean(axis=1), pairs)
    best = max(accuracy(true_NO[:, o], pairs) for o in range(OBJECTIVES))
    assert gate > bayes - 0.02
    assert gate > best + 0.1 > uniform + 0.1


def test_released_softmax_weighs_all_objectives_alike(fitted):
    gate = fitted.gate
    released = Gate(weights=gate.weights, biases=gate.biases, tau=gate.tau, logit_scale=gate.logit_scale, released=True)
    two = world(2, 3)[0]
    pairs = np.repeat(two[:, None, :], 2, axis=1)
    assert gate(pairs).sum(axis=-1) == pytest.approx(np.full((2, 2), gate.logit_scale), rel=1e-5)
    assert released(pairs) == pytest.approx(np.full((2, 2, OBJECTIVES), 0.5 * gate.logit_scale), rel=1e-5)


def test_gate_reads_the_prompt_and_nothing_else(fitted):
    prompts_PW, features_ND, _, _, _, cluster = world(50, 4)
    one, other = prompts_PW[cluster == 0][:1], prompts_PW[cluster == 1][:1]
    assert not np.allclose(fitted.gate(one), fitted.gate(other))
    inputs = Inputs(features_ND=features_ND[:2], prompts_PW=one, prompt_N=np.zeros(2, np.int64))
    values, parts = fitted.score(inputs)
    rewards = fitted.rewards(features_ND[:2])
    weights = [np.array(list(part.values())) / row for part, row in zip(parts, rewards, strict=True)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-4)
    assert [sum(part.values()) for part in parts] == pytest.approx(values.tolist(), rel=1e-5)


def test_coefficients_on_raw_objectives_give_the_same_score():
    rng = np.random.default_rng(5)
    transform = debias(np.abs(rng.normal(size=(500, 4))), 3)
    model = ArmoRM(
        objectives=("a", "b", "c", "verbosity"),
        weight_OD=rng.normal(size=(4, 10)),
        transform_OO=transform.astype(np.float64),
        scale_O=rng.random(4) + 0.5,
        gate=Gate(weights=(rng.normal(size=(3, 4)),), biases=(rng.normal(size=4),), logit_scale=1.7),
    )
    features, prompts = rng.normal(size=(20, 10)), rng.normal(size=(20, 3))
    raw = features @ model.weight_OD.T
    scores, _ = model.score(Inputs(features_ND=features, prompts_PW=prompts, prompt_N=np.arange(20)))
    assert (model.coefficients(prompts) * raw).sum(axis=1) == pytest.approx(scores, abs=1e-6)


def test_verbosity_is_taken_out_by_the_least_penalty_that_does():
    rng = np.random.default_rng(0)
    quality, long = rng.normal(size=20_000), rng.normal(size=20_000)
    rewards = np.stack([quality + 0.5 * long, quality - long, np.ones(20_000), long], axis=1)
    transform = debias(rewards, 3)
    after = rewards @ transform
    assert -transform[3, :3] == pytest.approx([0.5, 0, 0])
    assert all(spearman(after[:, o], long) <= 0.03 for o in range(3))
    assert (after[:, 3] == 0).all()


def test_what_cannot_be_debiased_keeps_lambda_one():
    long = np.random.default_rng(0).normal(size=1000)
    transform = debias(np.stack([3 * long, long], axis=1), 1)
    assert transform[1, 0] == -1
    assert GRID[0] == 0
    assert GRID[-1] == 0.95
    assert (debias(np.stack([3 * long, long], axis=1), None) == np.eye(2)).all()


def test_missing_labels_are_skipped_one_objective_at_a_time():
    rng = np.random.default_rng(0)
    features, truth = rng.normal(size=(2000, HIDDEN)).astype(np.float32), rng.normal(size=(3, HIDDEN))
    labels = (features @ truth.T).astype(np.float32)
    labels[rng.random(labels.shape) < 0.3] = np.nan
    labels[:50] = np.nan
    features[:50] = 1e6
    heads = fit_heads(features, labels, np.arange(2000), seed=0)
    assert heads.weight_OD == pytest.approx(truth, abs=0.02)
    assert max(heads.mse) < 1e-3


def test_an_objective_without_any_label_is_refused():
    with pytest.raises(ConfigError, match="Objective 1 has no label"):
        fit_heads(np.ones((4, 2), np.float32), np.array([[1, np.nan]] * 4, np.float32), np.arange(4), seed=0)


def test_a_constant_objective_is_fitted_and_not_penalised():
    features = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    heads = fit_heads(features, np.full((100, 1), 0.5, np.float32), np.arange(100), seed=0)
    assert np.isfinite(heads.weight_OD).all()
    assert spearman(np.ones(10), np.arange(10)) == 0


def test_a_uniform_gate_weighs_every_objective_alike():
    weights = uniform_gate(3, 4)(np.random.default_rng(0).normal(size=(2, 3)))
    assert weights == pytest.approx(np.full((2, 4), 0.25))
