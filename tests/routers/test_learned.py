"""Every learned model on a made-up world: four skills, an expert for each, and vectors that show the skill."""

from dataclasses import replace

import numpy as np
import pytest

from experts.errors import ConfigError
from routers.learned import MODELS, PROBABILITIES
from routers.learned.artefact import model_class
from routers.learned.base import Training, simplest_of, split_folds
from routers.learned.cells import Cells
from routers.learned.knn import Knn
from routers.learned.linear import Linear
from routers.learned.panel import Panel, relay, trio
from routers.learned.stack import pick_members
from routers.learned.task import Task
from routers.learned.threshold import Threshold
from routers.questions import Questions

ONE_OF_EACH = [name for name in MODELS if name not in ("panel", "threshold", "cascade")]


def world(size, *, seed=0, skilled=0.9, other=0.3, told=True, width=24):
    rng = np.random.default_rng(seed)
    skill = rng.integers(0, 4, size)
    vectors = np.eye(4, width)[skill] + rng.normal(0, 0.25, (size, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chance = np.where(np.arange(4) == skill[:, None], skilled, other)
    gold = rng.integers(0, 4, size)
    right = rng.random((size, 4)) < chance
    answers = np.where(right, gold[:, None], (gold[:, None] + rng.integers(1, 4, (size, 4))) % 4)
    questions = Questions(
        vectors_QW=vectors.astype(np.float32), tasks=tuple(f"skill{s}" if told else None for s in skill)
    )
    return skill, Training(
        questions=questions,
        scores_QE=right.astype(np.float32),
        answers_QE=answers.astype(np.int32),
        costs_E=np.array([1.0, 2.0, 3.0, 4.0]),
        seed=seed,
    )


@pytest.mark.parametrize(
    ("name", "told"), [(n, told) for n in ONE_OF_EACH for told in (True, False) if told or n != "task"]
)
def test_a_model_finds_the_specialist_of_questions_it_has_not_seen(name, told):
    _, training = world(400, told=told)
    skill, unseen = world(200, seed=1, told=told)
    predicted = model_class(name).fit(training).predict(unseen.questions)
    assert predicted.shape == (200, 4)
    assert np.isfinite(predicted).all()
    assert (predicted.argmax(axis=1) == skill).mean() > 0.9


@pytest.mark.parametrize("name", sorted(PROBABILITIES))
def test_a_probability_is_one(name):
    _, training = world(400)
    skill, unseen = world(400, seed=1)
    predicted = model_class(name).fit(training).predict(unseen.questions)
    assert predicted.min() >= 0
    assert predicted.max() <= 1
    specialists = predicted[np.arange(400), skill]
    others = (predicted.sum(axis=1) - specialists) / 3
    assert specialists.mean() > others.mean() + 0.2
    assert abs(predicted.mean() - 0.45) < 0.05, "on average it is right about how often experts are right"


@pytest.mark.parametrize("name", list(MODELS))
def test_the_same_seed_gives_the_same_model(name):
    _, training = world(200)
    maker = model_class(name)
    first, second = (maker.fit(training).predict(training.questions) for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("name", list(MODELS))
def test_one_question_is_predicted_as_it_is_among_others(name):
    _, training = world(200)
    model = model_class(name).fit(training)
    alone = model.predict(training.questions.take(np.array([7])))
    np.testing.assert_allclose(alone[0], model.predict(training.questions)[7], rtol=1e-4, atol=1e-5)


def test_when_skills_say_nothing_a_model_takes_the_best_expert():
    rng = np.random.default_rng(0)
    _, training = world(600, skilled=0.4, other=0.4, told=False)
    scores = (rng.random((600, 4)) < np.array([0.3, 0.3, 0.7, 0.3])).astype(np.float32)
    noise = Training(
        questions=training.questions, scores_QE=scores, answers_QE=training.answers_QE, costs_E=training.costs_E
    )
    chosen = Linear.fit(noise).predict(noise.questions).argmax(axis=1)
    assert (chosen == 2).mean() > 0.95


@pytest.mark.parametrize("name", ["linear", "logistic", "threshold"])
def test_length_tells_hard_from_easy_where_there_is_one_task(name):
    """Vectors say nothing; long questions are failed by the first expert and not by the second."""
    rng = np.random.default_rng(0)
    long = rng.random(300) < 0.5
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    questions = Questions(vectors_QW=vectors, tasks=(None,) * 300, texts=tuple("x" * (400 if w else 20) for w in long))
    scores = np.stack([~long, np.full(300, True)], axis=1) & (rng.random((300, 2)) < 0.95)
    costs = np.array([1.0, 9.0])
    training = Training(
        questions=questions, scores_QE=scores.astype(np.float32), answers_QE=np.zeros((300, 2), int), costs_E=costs
    )
    predicted = model_class(name).fit(training).predict(questions)
    margin = predicted[:, 1] - predicted[:, 0]
    assert margin[long].min() > margin[~long].max()
    unread = Questions(vectors_QW=vectors, tasks=questions.tasks)
    assert np.isfinite(model_class(name).fit(training).predict(unread)).all()


def test_a_task_never_seen_is_guessed_from_the_text():
    _, training = world(400)
    model = Task.fit(training)
    skill, unseen = world(100, seed=2, told=False)
    strange = Questions(vectors_QW=unseen.questions.vectors_QW, tasks=("never heard of",) * 100)
    assert (model.predict(strange).argmax(axis=1) == skill).mean() > 0.9


def test_the_vote_of_a_panel_is_the_weighted_vote():
    answers = np.array([[0, 1, 1], [0, 1, 2], [-1, 1, 2], [-1, -1, 2], [0, -1, -1], [-1, -1, -1], [0, 0, 1]])
    scores = (answers == np.array([1, 0, 1, 2, 0, 0, 0])[:, None]).astype(np.float32)
    assert trio((0, 1, 2), scores, answers).tolist() == [1, 1, 1, 1, 1, 0, 1]
    assert relay((0, 1), scores, answers).tolist() == [0, 1, 1, 0, 1, 0, 1]
    assert relay((0,), scores, answers).tolist() == scores[:, 0].tolist()


def test_a_panel_is_chosen_for_its_vote_and_not_for_its_members():
    """Two good experts that fail together, and two poorer ones that fail elsewhere: the mixed panel votes best."""
    rng = np.random.default_rng(0)
    size = 900
    twin = rng.random(size) < 0.6
    right = np.stack([twin, twin, twin, rng.random(size) < 0.55, rng.random(size) < 0.55], axis=1)
    gold = np.zeros(size, np.int64)
    # Twins make the same mistake; the others each their own.
    answers = np.where(right, gold[:, None], np.array([1, 1, 1, 2, 3]))
    _, base = world(size)
    training = Training(
        questions=base.questions, scores_QE=right.astype(np.float32), answers_QE=answers, costs_E=np.ones(5)
    )
    top = np.argsort(-Panel.fit(training).predict(training.questions), axis=1)[:, :3]
    assert {3, 4} <= set(top[0].tolist())
    assert len({0, 1, 2} & set(top[0].tolist())) == 1


def test_a_panel_may_be_a_leader_and_who_stands_in_for_him():
    """A leader who is right more often, but seldom unread, and a stand-in that is right where it is not."""
    rng = np.random.default_rng(0)
    _, base = world(600)
    silent = rng.random(600) < 0.3
    right = np.stack(
        [~silent & (rng.random(600) < 0.9), rng.random(600) < 0.5, silent | (rng.random(600) < 0.3)], axis=1
    )
    answers = np.where(right, 0, np.array([1, 2, 3]))
    answers[silent, 0] = -1
    training = Training(
        questions=base.questions, scores_QE=right.astype(np.float32), answers_QE=answers, costs_E=np.ones(3)
    )
    order = np.argsort(-Panel.fit(training).predict(training.questions), axis=1)
    assert order[0].tolist() == [0, 2, 1]


def test_the_threshold_router_sends_to_the_strong_expert_what_needs_it():
    rng = np.random.default_rng(0)
    _, base = world(600)
    hard = base.questions.vectors_QW[:, 0] > 0.5
    scores = np.stack([rng.random(600) < np.where(hard, 0.2, 0.9), rng.random(600) < 0.9], axis=1).astype(np.float32)
    training = Training(
        questions=base.questions,
        scores_QE=scores,
        answers_QE=np.full((600, 2), -1, np.int32),
        costs_E=np.array([1.0, 9.0]),
    )
    model = Threshold.fit(training)
    assert (model.strong, model.weak) == (1, 0)
    wins = model.predict(training.questions)[:, 1]
    assert wins[hard].mean() > wins[~hard].mean() + 0.08


def test_the_stack_leaves_out_what_does_not_help():
    scores = np.eye(3, dtype=np.float32)[np.arange(90) % 3]
    noise = np.random.default_rng(0).random((90, 3)).astype(np.float32)
    assert pick_members(np.stack([noise, scores]), scores).tolist() == [0, 1]


def test_folds_hold_out_every_question_once():
    parts = split_folds(10, seed=3)
    assert sorted(np.concatenate([held for _, held in parts]).tolist()) == list(range(10))
    assert all(not set(kept) & set(held) for kept, held in parts)


def test_folds_keep_families_together():
    families = np.array([0, 1, 0, 3, 3, 5, 6, 0, 8, 9])
    parts = split_folds(10, seed=3, families=families)
    assert sorted(np.concatenate([held for _, held in parts]).tolist()) == list(range(10))
    assert all(not set(families[kept]) & set(families[held]) for kept, held in parts)
    assert len(split_folds(6, seed=0, families=np.zeros(6, np.int64))) == 0, "one family leaves nothing to hold out"


def test_there_must_be_something_to_learn():
    _, training = world(8)
    for scores, message in ((np.ones((8, 4)), "nothing to learn"), (np.full((8, 4), np.nan), "not a number")):
        with pytest.raises(ConfigError, match=message):
            Training(
                questions=training.questions,
                scores_QE=scores,
                answers_QE=training.answers_QE,
                costs_E=training.costs_E,
            )


def test_the_simplest_of_equals_is_kept_and_a_clear_gain_is_not_given_up():
    _, training = world(300, told=False)
    _, hopeless = world(300, skilled=0.4, other=0.4)
    strengths = (1.0, 1e9)
    assert simplest_of(strengths, Linear.fit_with, training) == 1.0
    same_for_all = Training(
        questions=hopeless.questions,
        scores_QE=np.stack([hopeless.scores_QE[:, 0]] * 2, axis=1),
        answers_QE=hopeless.answers_QE[:, :2],
        costs_E=np.ones(2),
    )
    assert simplest_of(strengths, Linear.fit_with, same_for_all) == 1e9


def test_of_many_questions_only_the_nearest_cells_are_read():
    """Above its limit knn looks at some of the questions, and still finds the specialist, alone and among others."""
    _, training = world(21_000, width=8)
    skill, unseen = world(100, seed=1, width=8)
    model, whole = (Knn.fit_with(training, (50, 10.0, 0.3), exact=exact) for exact in (20_000, 21_000))
    assert len(model.cells.ends_C) > 1
    assert not len(whole.cells.ends_C)
    predicted = model.predict(unseen.questions)
    assert (predicted.argmax(axis=1) == skill).mean() > 0.95
    assert (predicted.argmax(axis=1) == whole.predict(unseen.questions).argmax(axis=1)).mean() > 0.95
    alone = model.predict(unseen.questions.take(np.array([7])))
    assert (alone[0] == predicted[7]).all()


@pytest.mark.parametrize("same_task", [0.0, 0.3])
def test_cells_that_are_all_read_find_the_same_neighbours(same_task):
    _, training = world(600)
    _, unseen = world(50, seed=1)
    whole = Knn.fit_with(training, (20, 10.0, same_task))
    sorted_in, again = (Knn.fit_with(training, (20, 10.0, same_task), exact=0) for _ in range(2))
    assert (sorted_in.cells.centres_CW == again.cells.centres_CW).all()
    np.testing.assert_allclose(sorted_in.predict(unseen.questions), whole.predict(unseen.questions), atol=1e-6)


def test_cells_hold_enough_for_the_neighbours_however_little_is_read():
    _, training = world(600)
    model = Knn.fit_with(training, (50, 10.0, 0.0), exact=0)
    stingy = replace(model, cells=replace(model.cells, read=1))
    assert np.isfinite(stingy.predict(training.questions)).all()


def test_cells_hold_every_vector_once_and_the_nearest_come_first():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cells, order = Cells.fit(vectors, 0, exact=100)
    assert sorted(order.tolist()) == list(range(500))
    parts = list(cells.near(vectors[0], 1))
    assert sum(p.stop - p.start for p in parts) == cells.ends_C[-1] == 500, "more may be read than there are"
    few = list(replace(cells, read=100).near(vectors[0], 1))
    assert few == parts[: len(few)]
    assert 0 in np.concatenate([order[p] for p in few])
