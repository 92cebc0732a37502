"""The stack's model and its fit: on pools whose truth is planted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from orchestrator.aggregators.stacking import artefact
from orchestrator.aggregators.stacking.build import (
    Stack,
    Wish,
    fit_stack,
)
from orchestrator.aggregators.stacking.fitting import fit_logit, random_panels
from orchestrator.aggregators.stacking.model import Ballots, Logit
from orchestrator.aggregators.stacking.options import TRAITS, option_traits
from orchestrator.aggregators.stacking.prior import Prior, softmax
from orchestrator.aggregators.stacking.recorded import Recorded, read_recorded, rows_of
from orchestrator.aggregators.stacking.stopping import (
    Stop,
    Walk,
    best_rule,
    decide,
    expected_gain,
    hear,
    stopping_curve,
)
from orchestrator.aggregators.stacking.words import WORDS, answer_words, checked_sums
from tests.orchestrator.planted import RATES, write_pool


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return read_recorded(write_pool(tmp_path_factory.mktemp("pool")))


@pytest.fixture(scope="module")
def fitted(planted: Recorded) -> artefact.Fitted:
    return artefact.fit(planted, rows_of(planted, ["train", "val"]), Wish(calls=2.0))


def ballots(votes: list[list[int]], options: int = 4) -> Ballots:
    votes_QE = np.array(votes)
    count = len(votes)
    is_open = np.ones((count, options + 1), np.bool_)
    is_open[:, -1] = False
    return Ballots(
        votes_QE=votes_QE,
        asked_QE=np.ones(votes_QE.shape, np.bool_),
        words_QEW=np.zeros((*votes_QE.shape, 1)),
        open_QO=is_open,
        prior_QO=np.zeros(is_open.shape),
        tasks_Q=np.zeros(count, np.int64),
        listed_Q=np.ones(count, np.bool_),
    )


def planted_votes(worth: list[float], count: int, options: int = 4) -> tuple[Ballots, np.ndarray]:
    """Votes whose likelihood is the logit's own with these worths: right with odds e^w to each wrong option."""
    rng = np.random.default_rng(0)
    gold = rng.integers(0, options, count)
    rates = [np.exp(w) / (np.exp(w) + options - 1) for w in worth]
    wrong = [(gold + rng.integers(1, options, count)) % options for _ in worth]
    votes = [np.where(rng.random(count) < r, gold, other) for r, other in zip(rates, wrong, strict=True)]
    return ballots(np.array(votes).T.tolist(), options), gold


def test_the_logit_recovers_planted_weights() -> None:
    worth = [2.0, 1.0, 0.0]
    many, gold = planted_votes(worth, 6000)
    logit = fit_logit(many, gold, tasks=1, panels=2, seed=0)
    full = logit.strength(many)[0] * (logit.worth_E + logit.in_task_CE[0])
    assert full == pytest.approx(worth, abs=0.15)
    assert abs(logit.shape[0]) < 0.1, "independent experts are not damped"


def test_experts_that_copy_each_other_are_damped() -> None:
    one, gold = planted_votes([1.0], 3000)
    copies = replace(
        one,
        votes_QE=np.repeat(one.votes_QE, 4, axis=1),
        asked_QE=np.repeat(one.asked_QE, 4, axis=1),
        words_QEW=np.repeat(one.words_QEW, 4, axis=1),
    )
    assert fit_logit(copies, gold, tasks=1, panels=2, seed=0).shape[0] > 0.7


def test_the_gradient_is_the_losss_slope() -> None:
    from orchestrator.aggregators.stacking.fitting import _loss, _Votes

    rng = np.random.default_rng(1)
    many, gold = planted_votes([1.0, 0.5, 0.2], 40)
    many = replace(
        many,
        words_QEW=rng.normal(size=(40, 3, 2)),
        prior_QO=rng.normal(size=many.open_QO.shape),
        listed_Q=np.arange(40) % 2 == 0,
        open_QO=many.open_QO | (np.arange(40) % 2 == 1)[:, None],
    ).hearing(random_panels(40, 3, seed=0))
    weights = [rng.normal(size=s) for s in ((3,), (2, 3), (2,), (5,))]
    right = many.right(gold)
    votes = _Votes.of(many)
    _, gradients = _loss(weights, votes, right, 0.5)
    for place, weight in enumerate(weights):
        for index in np.ndindex(weight.shape):
            shifted = [[w.copy() for w in weights] for _ in range(2)]
            shifted[0][place][index] -= 1e-5
            shifted[1][place][index] += 1e-5
            below, above = (_loss(w, votes, right, 0.5)[0] for w in shifted)
            assert (above - below) / 2e-5 == pytest.approx(gradients[place][index], abs=1e-4)


def test_the_priors_gradient_is_its_losss_slope() -> None:
    from scipy.sparse import csr_array

    from orchestrator.aggregators.stacking.prior import _loss

    rng = np.random.default_rng(2)
    is_open = np.ones((6, 3), np.bool_)
    is_open[0, 2] = False
    inputs = rng.normal(size=(int(is_open.sum()), 4)).astype(np.float32)
    target = np.arange(3) == np.zeros(6, np.int64)[:, None]
    grams = csr_array(rng.random((len(inputs), 7)).astype(np.float32))
    weights, read = [rng.normal(size=s) for s in ((4, 5), (5,), (5,), (7,))], (inputs, grams, grams.T.tocsr())
    _, gradients = _loss(weights, read, is_open, target)
    for place, weight in enumerate(weights):
        index = (0,) * weight.ndim
        shifted = [[w.copy() for w in weights] for _ in range(2)]
        shifted[0][place][index] -= 1e-2
        shifted[1][place][index] += 1e-2
        below, above = (_loss(w, read, is_open, target)[0] for w in shifted)
        assert (above - below) / 2e-2 == pytest.approx(gradients[place][index], rel=0.02, abs=0.02)


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(4)), st.lists(st.integers(-1, 3), min_size=4, max_size=4))
def test_the_order_of_experts_does_not_matter(order: list[int], votes: list[int]) -> None:
    logit = Logit(
        worth_E=np.array([1.0, 0.5, 0.2, -0.1]),
        in_task_CE=np.zeros((1, 4)),
        words_W=np.zeros(1),
        shape=np.array([0.3, 0.5, 0.1, 0, 0]),
    )
    turned = replace(logit, worth_E=logit.worth_E[order], in_task_CE=logit.in_task_CE[:, order])
    straight = logit.posterior(ballots([votes]))
    assert turned.posterior(ballots([[votes[i] for i in order]])) == pytest.approx(straight)
    assert straight.sum() == pytest.approx(1)


def test_an_expert_not_heard_counts_for_nothing(fitted: artefact.Fitted, planted: Recorded) -> None:
    rows = rows_of(planted, ["test"])
    asked = fitted.stack.prepare(planted.ballots.take(rows), planted.options.take(rows))
    other = replace(asked, votes_QE=asked.votes_QE.copy())
    other.votes_QE[:, 3] = 0
    posterior = [fitted.stack.logit.posterior(hear(b, [0, 1])) for b in (asked, other)]
    assert np.array_equal(*posterior)


def test_the_best_expert_is_asked_first_and_beaten(fitted: artefact.Fitted, planted: Recorded) -> None:
    assert fitted.expert_ids[fitted.stack.order[0]] == "ace"
    rows = rows_of(planted, ["test"])
    chosen, _ = decide(fitted.stack.logit, fitted.stack.prepare(planted.ballots.take(rows), planted.options.take(rows)))
    best = planted.records.scores_QE[rows].mean(axis=0).max()
    assert (chosen == planted.gold_Q[rows]).mean() >= best - 0.02
    assert list(RATES)[fitted.stack.logit.worth_E.argmin()] == "noise"


def test_calls_grow_with_the_threshold_and_keep_to_the_budget(fitted: artefact.Fitted) -> None:
    curve = fitted.stack.curve_XF
    for gain in np.unique(curve[:, 1]):
        rows = curve[curve[:, 1] == gain]
        assert (np.diff(rows[:, 0]) > 0).all()
        assert (np.diff(rows[:, 2]) >= 0).all()
    for calls in (1.0, 1.5, 2.0, 3.0):
        stop, mean_calls, right = best_rule(curve, calls)
        (row,) = curve[(curve[:, 0] == stop.threshold) & (curve[:, 1] == stop.least_gain)]
        assert row[2:4].tolist() == [mean_calls, right]
        assert row[2] + 1.645 * row[4] / 1000**0.5 <= calls, "95 % of all thousands of questions to come keep to it"
    assert fitted.stack.stop == best_rule(curve, 2.0)[0]
    with pytest.raises(ConfigError, match="at least one call"):
        best_rule(curve, 0.5)


def test_a_question_is_left_alone_once_it_is_sure_or_hopeless() -> None:
    sure = np.array([[0.9, 0.9, 0.9], [0.2, 0.8, 0.9], [0.1, 0.1, 0.1], [0.0, 0.0, 0.9]])
    gain = np.array([[0.1, 0.1, 0.0], [0.3, 0.1, 0.0], [0.05, 0.01, 0.0], [0.5, 0.5, 0.0]])
    assert Stop(threshold=0.7).places(sure, gain).tolist() == [0, 1, 2, 2]
    assert Stop(threshold=0.7, least_gain=0.01).places(sure, gain).tolist() == [0, 1, 1, 2]
    assert Stop(threshold=0.0).places(sure, gain).tolist() == [0, 0, 0, 2], "nothing that could be read is not enough"
    curve = stopping_curve(Walk(sure_QK=sure, gain_QK=gain, right_QK=np.ones((4, 3), np.bool_)))
    assert curve[:, 2].min() == 1
    assert curve[:, 2].max() == 3


def test_a_call_is_worth_what_it_is_expected_to_change() -> None:
    """Against the definition, written out for one question: whoever comes next chooses option o with its posterior."""
    logit = Logit(
        worth_E=np.array([2.0, 1.0, 0.5]),
        in_task_CE=np.array([[0.1, 0.2, 0.9]]),
        words_W=np.zeros(1),
        shape=np.array([0.3, 0.5, 0.1, 0, 0]),
    )
    asked = replace(
        ballots([[0, -1, -1]]), asked_QE=np.array([[True, False, False]]), prior_QO=np.log([[0.2, 0.5, 0.2, 0.1, 1.0]])
    )
    now = logit.posterior(asked)[0]

    def best_after(option: int, calls: int) -> float:
        votes = [[0, *[option if e <= calls else -1 for e in (1, 2)]]]
        heard = np.array([[True, calls >= 1, calls >= 2]])
        after = logit.posterior(replace(asked, votes_QE=np.array(votes), asked_QE=heard))[0]
        return float(max(after[0], after[option]))

    usual = logit.usual(asked.tasks_Q)[:, 1:]
    one, two = (sum(p * best_after(o, calls) for o, p in enumerate(now)) - now[0] for calls in (1, 2))
    assert expected_gain(logit, asked, usual[:, :1]) == pytest.approx([one])
    assert expected_gain(logit, asked, usual) == pytest.approx([max(one, two / 2)])
    assert expected_gain(logit, asked, usual[:, :0]) == pytest.approx([0])
    certain = replace(asked, prior_QO=20 * np.log([[0.999997, 1e-6, 1e-6, 1e-6, 1.0]]))
    assert expected_gain(logit, certain, usual) == pytest.approx([0], abs=1e-6)


def test_a_prior_is_never_that_of_a_network_which_saw_the_question(
    planted: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question's own traits are marked; a network that was fitted on it would recognise the mark."""
    from orchestrator.aggregators.stacking import build

    traits = planted.options.traits_QOT.copy()
    traits[:, :, 0] = np.arange(len(traits))[:, None]
    seen: list[set[int]] = []

    class Spy(Prior):
        @classmethod
        def fit(cls, options, open_QO, right_Q, family_Q, seed):  # type: ignore[no-untyped-def]
            seen.append(set(options.traits_QOT[:, 0, 0].astype(int).tolist()))
            fitted = Prior.fit(options, open_QO, right_Q, family_Q, seed)
            spy = Spy(**{name: getattr(fitted, name) for name in Prior.__dataclass_fields__})
            object.__setattr__(spy, "own", seen[-1])
            return spy

        def predict(self, options, open_QO):  # type: ignore[no-untyped-def]
            asked = set(options.traits_QOT[:, 0, 0].astype(int).tolist())
            assert not asked & seen[len(predicted)], "predicted for a question that it was fitted on"
            predicted.append(len(asked))
            return Prior.predict(self, options, open_QO)

    predicted: list[int] = []
    monkeypatch.setattr(build, "Prior", Spy)
    monkeypatch.setattr("orchestrator.aggregators.stacking.prior._STEPS", 2)
    rows = rows_of(planted, ["train"])
    fit_stack(replace(planted, options=replace(planted.options, traits_QOT=traits)), rows, Wish())
    assert sum(predicted) == len(rows)
    assert len(seen) == build.FOLDS + 1


def test_it_comes_back_from_disk_the_same(fitted: artefact.Fitted, planted: Recorded, tmp_path: Path) -> None:
    artefact.save(fitted, tmp_path)
    again = artefact.load(tmp_path)
    rows = rows_of(planted, ["test"])

    def posterior(stack: Stack) -> np.ndarray:
        return stack.logit.posterior(stack.prepare(planted.ballots.take(rows), planted.options.take(rows)))

    assert np.array_equal(posterior(again.stack), posterior(fitted.stack))
    assert (again.expert_ids, again.stack.order, again.tasks) == (fitted.expert_ids, fitted.stack.order, fitted.tasks)


def test_two_fits_are_the_same_to_the_bit(fitted: artefact.Fitted, planted: Recorded) -> None:
    again = fit_stack(planted, rows_of(planted, ["train", "val"]), Wish(calls=2.0))
    assert np.array_equal(again.logit.worth_E, fitted.stack.logit.worth_E)
    assert np.array_equal(again.curve_XF, fitted.stack.curve_XF)


@pytest.mark.parametrize("damage", ["missing", "cut", "version", "nan", "shape", "stop", "hashless"])
def test_a_damaged_artefact_is_refused(fitted: artefact.Fitted, tmp_path: Path, damage: str) -> None:
    stack = fitted.stack
    if damage == "nan":
        stack = replace(stack, logit=replace(stack.logit, worth_E=stack.logit.worth_E * np.nan))
    if damage == "shape":
        stack = replace(stack, logit=replace(stack.logit, worth_E=stack.logit.worth_E[:-1]))
    if damage == "stop":
        stack = replace(stack, stop=Stop(threshold=2.0))
    artefact.save(replace(fitted, stack=stack), tmp_path)
    if damage == "hashless":
        head = json.loads((tmp_path / artefact.FORMAT.head).read_text())
        del head["sha256"]
        (tmp_path / artefact.FORMAT.head).write_text(json.dumps(head))
        with pytest.raises(ConfigError, match="from before it held the hash"):
            artefact.load(tmp_path)
    if damage == "missing":
        (tmp_path / artefact.FORMAT.head).unlink()
    if damage == "cut":
        body = (tmp_path / artefact.FORMAT.body).read_bytes()
        (tmp_path / artefact.FORMAT.body).write_bytes(body[: len(body) // 2])
    if damage == "version":
        head = (
            (tmp_path / artefact.FORMAT.head)
            .read_text()
            .replace(f'"version": {artefact.FORMAT.version}', '"version": 99')
        )
        (tmp_path / artefact.FORMAT.head).write_text(head)
    with pytest.raises(ConfigError, match="collegium build stack"):
        artefact.load(tmp_path)


def test_cached_features_are_those_that_were_read(planted: Recorded, tmp_path: Path) -> None:
    folder = write_pool(tmp_path / "pool")
    for _ in range(2):
        again = read_recorded(folder, cache=tmp_path / "cache")
        assert np.array_equal(again.ballots.words_QEW, planted.ballots.words_QEW)
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(b"broken")
    assert np.array_equal(read_recorded(folder, cache=tmp_path / "cache").gold_Q, planted.gold_Q)


def test_open_questions_have_the_answers_given_as_options_and_none_of_them(tmp_path: Path) -> None:
    folder = write_pool(tmp_path, questions=40)
    import gzip

    import orjson

    path = folder / "questions.jsonl.gz"
    rows = [orjson.loads(line) | {"options": None} for line in gzip.decompress(path.read_bytes()).splitlines()]
    with gzip.GzipFile(path, "wb", mtime=0) as out:
        out.writelines(orjson.dumps(row) + b"\n" for row in rows)
    recorded = read_recorded(folder)
    assert not recorded.ballots.listed_Q.any()
    none = recorded.ballots.open_QO.shape[1] - 1
    wrong = recorded.records.scores_QE.max(axis=1) == 0
    assert (recorded.gold_Q[wrong] == none).all()
    assert (recorded.gold_Q[~wrong] < none).all()
    heard = hear(recorded.ballots, [3])
    assert (heard.open_QO.sum(axis=1) <= 2).all()
    stack = fit_stack(recorded, rows_of(recorded, ["train"]), Wish())
    assert stack.prior is None


def test_too_few_questions_are_refused(planted: Recorded) -> None:
    with pytest.raises(ConfigError, match="too few"):
        fit_stack(planted, np.arange(5), Wish())
    with pytest.raises(ConfigError, match="no question says"):
        fit_stack(replace(planted, gold_Q=np.full_like(planted.gold_Q, -1)), np.arange(50), Wish())
    mute = replace(planted.ballots, votes_QE=np.full_like(planted.ballots.votes_QE, -1))
    with pytest.raises(ConfigError, match="no row in responses/ has an 'answer' that can be read"):
        fit_stack(replace(planted, ballots=mute), np.arange(50), Wish())


def test_sums_in_a_text_are_checked() -> None:
    assert checked_sums("3 * 60 = 180 and 2+2=5, 7/0 = 1; 1,000 - 1 = 999 so 3*60=<<3*60=180>>180") == (3, 1)


def test_words_stand_up_to_anything() -> None:
    for text in ("", " ", "=" * 10_000, "1+" * 50_000, "9" * 100_000, "\udcff", "the answer is"):
        words = answer_words(text, text, text, (text,))
        assert words.shape == (len(WORDS),)
        assert np.isfinite(words).all()


@given(st.lists(st.text(max_size=30), min_size=2, max_size=12), st.text(max_size=60))
@settings(max_examples=25, deadline=None)
def test_traits_are_finite_whatever_the_options(options: list[str], question: str) -> None:
    traits = option_traits(options, question)
    assert traits.shape == (len(options), len(TRAITS))
    assert np.isfinite(traits).all()


def test_softmax_gives_nothing_to_what_is_not_there() -> None:
    assert softmax(np.array([[0.0, -np.inf, 0.0]])).tolist() == [[0.5, 0.0, 0.5]]
