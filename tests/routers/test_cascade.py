import numpy as np

from routers.learned.base import Training
from routers.learned.cascade import Cascade, front
from routers.questions import Questions


def world(size=600, seed=0):
    """Three experts, each dearer and better; half of the questions are easy for all, and show it."""
    rng = np.random.default_rng(seed)
    easy = rng.random(size) < 0.5
    chance = np.where(easy[:, None], [0.9, 0.92, 0.95], [0.2, 0.5, 0.9])
    vectors = np.stack([np.where(easy, 1.0, -1.0), np.ones(size)], axis=1) + rng.normal(0, 0.1, (size, 2))
    training = Training(
        questions=Questions(vectors_QW=vectors.astype(np.float32), tasks=(None,) * size),
        scores_QE=(rng.random((size, 3)) < chance).astype(np.float32),
        answers_QE=np.zeros((size, 3), np.int32),
        costs_E=np.array([1.0, 3.0, 9.0]),
        seed=seed,
    )
    return easy, training


def test_the_front_leaves_out_who_is_dearer_and_no_better():
    assert front(np.array([0.5, 0.4, 0.7, 0.7, 0.9]), np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == [0, 2, 4]
    many = front(np.arange(10) / 10, np.arange(10) + 1.0)
    assert (len(many), many[0], many[-1]) == (4, 0, 9)
    assert front(np.array([0.9, 0.1]), np.array([1.0, 2.0])) == [0]


def test_easy_questions_begin_cheap_and_hard_ones_dear():
    _, training = world()
    easy, unseen = world(seed=1)
    first = Cascade.fit(training).at(0.6).predict(unseen.questions).argmax(axis=1)
    assert (first[easy] == 0).mean() > 0.9
    assert (first[~easy] == 2).mean() > 0.6


def test_later_stages_follow_in_order_and_skipped_ones_are_spares():
    _, training = world()
    model = Cascade.fit(training)
    order = np.argsort(-model.predict(training.questions), axis=1)
    first = order[:, 0]
    assert {tuple(row) for row in order[first == 0]} <= {(0, 1, 2)}
    assert {tuple(row) for row in order[first == 2]} <= {(2, 1, 0)}


def test_a_smaller_budget_spends_less_without_a_new_fit():
    _, training = world()
    _, unseen = world(seed=1)
    model, costs = Cascade.fit(training), training.costs_E
    spent = [costs[model.at(s).predict(unseen.questions).argmax(axis=1)].mean() / 9 for s in (1.0, 0.6, 0.3, 0.05)]
    assert spent == sorted(spent, reverse=True)
    for asked, was in zip((1.0, 0.6, 0.3), spent, strict=False):
        assert was <= asked + 0.05
    assert spent[-1] == 1 / 9, "no budget is too small for the cheapest expert"
