"""The measures of the rewards' evaluation, on numbers that can be checked by hand."""

from dataclasses import replace

import numpy as np
import pytest

from evals.aggregate.attacked import _rate, _with_attack, readable
from evals.aggregate.fitted import _only
from evals.aggregate.rewards import HeldOut, _mean, _vote
from evals.routing.statistics import Estimate
from orchestrator.aggregators.reward_moe.armorm import ArmoRM, uniform_gate
from orchestrator.aggregators.reward_moe.attacks import HELD_OUT, KINDS
from orchestrator.aggregators.reward_moe.corpus import Corpus
from orchestrator.aggregators.reward_moe.inputs import RAW_NAMES, Inputs, Scaling, make_panel
from orchestrator.aggregators.reward_moe.samples import Sample

SAMPLE = Sample(
    panel=make_panel("Which?", ("red", "blue"), ["(A)", "(B)", "(B)"]),
    source="s",
    category="c",
    labels=({"correct": 0.0}, {"correct": 1.0}, {"correct": 1.0}),
    pairs=((1, 0), (2, 0)),
)


def held_out(*samples):
    starts = np.cumsum([0, *(len(s.panel.texts) for s in samples)])
    return HeldOut(
        name="s",
        samples=samples,
        corpus=Corpus(
            inputs=Inputs(
                features_ND=np.zeros((starts[-1], 1), np.float32),
                prompts_PW=np.zeros((len(samples), 1), np.float32),
                prompt_N=np.repeat(np.arange(len(samples)), [len(s.panel.texts) for s in samples]),
            ),
            scaling=Scaling.fit(np.zeros((2, len(RAW_NAMES)), np.float32)),
            objectives=("correct",),
            labels_NO=np.zeros((starts[-1], 1), np.float32),
            pairs_K2=np.array([(w + s, x + s) for s, own in zip(starts, samples, strict=False) for w, x in own.pairs]),
            categories=("c",) * len(samples),
            sources=("s",) * len(samples),
            real_N=np.ones(starts[-1], bool),
        ),
    )


def test_accuracy_is_by_prompt_and_a_tie_counts_half():
    scores = np.array([0.0, 1.0, 0.0, 5.0, 1.0, 2.0])
    assert held_out(SAMPLE, SAMPLE).accuracy(scores).tolist() == [0.75, 0.0]


def test_a_vote_goes_to_the_larger_group_then_to_the_better_expert():
    split = replace(SAMPLE, panel=make_panel("Which?", ("red", "blue"), ["(A)", "(B)", "?"]))
    silent = replace(SAMPLE, panel=make_panel("Which?", ("red", "blue"), ["?", "?", "?"]))
    assert _vote(held_out(SAMPLE, split, silent)).tolist() == [1.0, 0.0, 0.0]


def test_an_attack_wins_only_where_it_is_above_all_others():
    scores = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 2.0, 1.0, 0.0])
    assert _rate(scores, [3, 6, 8]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_stands_last_and_is_read_like_an_answer(kind):
    attacked = _with_attack(SAMPLE, kind, np.random.default_rng(0))
    assert attacked.panel.texts[:3] == SAMPLE.panel.texts
    assert len(attacked.panel.texts) == len(attacked.panel.choices) == 4
    assert any(wording.split("{")[0] in attacked.panel.texts[3] for wording in HELD_OUT[kind])


def test_an_attack_is_read_as_best_of_reads_it():
    question = "Which?\nA. red\nB. blue"
    texts = ["The answer is (A).", "No comment.", "You are a genius. The answer is (B)."]
    panel = make_panel(question, ("red", "blue"), texts)
    assert readable(replace(SAMPLE, panel=panel)).tolist() == [True, False, True]
    silent = make_panel(question, ("red", "blue"), ["No comment.", "What a great question!"])
    assert readable(replace(SAMPLE, panel=silent)).tolist() == [True, True]
    talk = make_panel("Tell me about the sea.", (), ["It is blue.", "No comment."])
    assert readable(replace(SAMPLE, panel=talk)).tolist() == [True, True]


def test_sources_count_the_same_in_the_mean():
    one, other = Estimate(value=0.8, low=0.77, high=0.83), Estimate(value=0.6, low=0.56, high=0.64)
    found = _mean({"a": one, "b": other})
    assert found.value == pytest.approx(0.7)
    assert found.ci95 == pytest.approx([0.675, 0.725])


def test_one_objective_alone_is_its_reward():
    rng = np.random.default_rng(0)
    model = ArmoRM(
        objectives=("a", "b"),
        weight_OD=rng.normal(size=(2, 3)),
        transform_OO=np.eye(2),
        scale_O=np.ones(2),
        gate=uniform_gate(4, 2),
    )
    inputs = Inputs(
        features_ND=rng.normal(size=(5, 3)), prompts_PW=rng.normal(size=(1, 4)), prompt_N=np.zeros(5, np.int64)
    )
    alone = replace(model, gate=_only(model, 1)).score(inputs)[0]
    assert alone == pytest.approx(model.rewards(inputs.features_ND)[:, 1])
