import numpy as np
import pytest

from evals.routing.aggregator_choice import make_exams, rank_mergers
from experts.errors import ConfigError

RNG = np.random.default_rng(0)
SCORES = (RNG.random((200, 5)) < 0.4).astype(float)
TEXTS = [[f"{'right' if s else 'wrong'} {q} {e}" for e, s in enumerate(row)] for q, row in enumerate(SCORES)]


def test_an_exam_shows_one_right_and_two_wrong_answers_where_there_are():
    exams = make_exams(TEXTS, SCORES, 0)
    for exam, row in zip(exams, SCORES, strict=True):
        right = sum(r.startswith("right") for r in exam.responses)
        wrong = sum(r.startswith("wrong") for r in exam.responses)
        assert len(exam.responses) == 3
        assert right == min(1, row.sum()) == exam.winnable
        assert wrong == min(2, (1 - row).sum())
    places = [i for exam in exams for i, r in enumerate(exam.responses) if r.startswith("right")]
    assert set(places) == {0, 1, 2}, "the right one is not always in the same place"
    assert make_exams(TEXTS, SCORES, 0) == exams


def test_texts_that_were_not_kept_leave_the_exam_unwinnable():
    (exam,) = make_exams([[None, "wrong"]], np.array([[1.0, 0.0]]), 0)
    assert not exam.winnable
    assert sorted(exam.responses) == ["", "", "wrong"]


async def test_experts_are_ranked_by_how_often_they_make_the_right_answer():
    skill = {"poor": 0.3, "good": 0.9, "fair": 0.6}
    rng = np.random.default_rng(1)

    def merger(chance):
        async def merge(exam):
            return float(exam.winnable and rng.random() < chance)

        return merge

    found = await rank_mergers(make_exams(TEXTS, SCORES, 0), {name: merger(p) for name, p in skill.items()})
    assert [m.name for m in found] == ["good", "fair", "poor"]
    for m in found:
        assert m.winnable_score == pytest.approx(skill[m.name], abs=0.1)
        assert m.winnable_score > m.score, "questions that nobody got cannot be won by choosing"


async def test_there_must_be_something_to_rank():
    with pytest.raises(ConfigError, match="a question and an expert"):
        await rank_mergers([], {})
