import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.base import Score
from experts.errors import CollegiumError, ConfigError, ExpertFailed
from experts.types import Completion, Request
from orchestrator.aggregators.best_of import BestOf
from orchestrator.aggregators.rewards import Agreement
from tests.orchestrator.aggregators.scripted import ask, decided, parts, said

DECISION = decided(a=3, b=2, c=1)


class Table:
    """A Reward that looks an answer's score up; ``failure`` is raised instead."""

    name = "table"

    def __init__(self, failure: CollegiumError | None = None, **scores: float) -> None:
        self._failure = failure
        self._scores = scores
        self.seen: list[str] = []

    async def score(self, request: Request, answers: Sequence[Completion]) -> list[Score]:
        if self._failure is not None:
            raise self._failure
        self.seen += [a.text for a in answers]
        scores = [self._scores.get(a.text) for a in answers]
        return [Score(value=s, parts={"looked_up": s}) for s in scores if s is not None]


async def pick(reward: object, answers: list[Completion]) -> Completion:
    aggregator = BestOf(parts())
    aggregator._reward = reward  # type: ignore[assignment]
    return await aggregator.aggregate(ask(), DECISION, answers)


async def test_the_best_scored_answer_is_given() -> None:
    answer = await pick(Table(x=0.1, y=0.7, z=0.3), said(a="x", b="y", c="z"))
    assert (answer.expert_id, answer.text) == ("b", "y")
    assert answer.trace == {
        "reward": "table",
        "answers": [
            {"expert_id": "a", "score": 0.1, "parts": {"looked_up": 0.1}},
            {"expert_id": "b", "score": 0.7, "parts": {"looked_up": 0.7}},
            {"expert_id": "c", "score": 0.3, "parts": {"looked_up": 0.3}},
        ],
    }


async def test_equal_answers_are_scored_once_and_the_better_ranked_expert_gives_it() -> None:
    reward = Table(x=0.5, y=0.5)
    answer = await pick(reward, said(c="x", b="x", a="y"))
    assert answer.expert_id == "a"
    assert sorted(reward.seen) == ["x", "y"]
    assert (await pick(Table(x=0.9, y=0.5), said(c="x", b="x", a="y"))).expert_id == "b"


async def test_an_empty_answer_wins_only_where_all_are() -> None:
    reward = Table(**{"": 9.0, " ": 9.0, "x": 0.1})
    assert (await pick(reward, said(a="", b=" ", c="x"))).text == "x"
    assert (await pick(reward, said(b=" ", c=""))).expert_id == "b"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
async def test_a_score_that_is_no_number_does_not_count(bad: float) -> None:
    answer = await pick(Table(x=bad, y=-5.0, z=-7.0), said(a="x", b="y", c="z"))
    assert answer.text == "y"
    assert answer.trace is not None
    assert answer.trace["note"] == "1 scores were no numbers and do not count"
    assert answer.trace["answers"][0] == {"expert_id": "a", "score": None}
    json.dumps(answer.trace, allow_nan=False)


@pytest.mark.parametrize(
    ("reward", "because"),
    [
        (Table(**{"4": math.nan, "5": math.nan, "5.0": math.nan}), "the reward gave no number"),
        (Table(ExpertFailed("down")), "the reward failed (expert_failed)"),
        (Table(x=1.0), "the reward failed (expert_failed)"),
    ],
    ids=["only NaN", "fails", "too few scores"],
)
async def test_without_scores_the_answers_vote(reward: Table, because: str) -> None:
    answer = await pick(reward, said(a="4", b="5", c="5.0"))
    assert answer.trace is not None
    assert answer.trace["note"].startswith(f"{because}: a weighted vote instead")
    assert answer.trace["votes"] == {"4": 0.5, "5": 0.5}


CHOICE = "Which is red?\nA. the sky\nB. blood\nC. grass"


async def test_an_answer_that_cannot_be_read_wins_only_where_none_can() -> None:
    charm = "What a great question, only a genius asks this!"
    aggregator = BestOf(parts())
    aggregator._reward = Table(**{charm: 9.0, "B": 0.1, "No comment.": 3.0})  # type: ignore[assignment]
    answer = await aggregator.aggregate(ask(CHOICE), DECISION, said(a=charm, b="B", c="No comment."))
    assert answer.text == "B"
    assert answer.trace is not None
    assert answer.trace["note"] == "no answer could be read from a, c: those that can be read go first"
    assert answer.trace["answers"][0]["score"] == 9.0, "what the reward thought is not hidden"
    none = await aggregator.aggregate(ask(CHOICE), DECISION, said(a=charm, c="No comment."))
    assert (none.text, "note" in (none.trace or {})) == (charm, False)


async def test_a_number_is_wanted_where_most_answers_give_one() -> None:
    """The question's words may be misread: here as if "how much" asked for a number."""
    aggregator = BestOf(parts())
    aggregator._reward = Table(**{"8": 0.1, "9": 0.2, "A lot, thank you.": 9.0, "With all my heart.": 5.0})  # type: ignore[assignment]
    sums = await aggregator.aggregate(ask("How many?"), DECISION, said(a="8", b="9", c="A lot, thank you."))
    talk = await aggregator.aggregate(
        ask("How much do you love me?"), DECISION, said(a="8", b="A lot, thank you.", c="With all my heart.")
    )
    assert (sums.text, talk.text) == ("9", "A lot, thank you.")


async def test_an_attack_that_names_an_option_is_an_answer_like_any_other() -> None:
    reward = Table(**{"You are so clever! The answer is C.": 9.0, "The answer is B.": 0.1})
    aggregator = BestOf(parts())
    aggregator._reward = reward  # type: ignore[assignment]
    texts = {"a": "The answer is B.", "b": "You are so clever! The answer is C."}
    assert (await aggregator.aggregate(ask(CHOICE), DECISION, said(**texts))).expert_id == "b"


async def test_free_text_can_always_be_read() -> None:
    reward = Table(**{"What a great question!": 9.0, "It was built in Rome.": 0.1})
    aggregator = BestOf(parts())
    aggregator._reward = reward  # type: ignore[assignment]
    texts = {"a": "It was built in Rome.", "b": "What a great question!"}
    answer = await aggregator.aggregate(ask("Where was it built?"), DECISION, said(**texts))
    assert answer.expert_id == "b"
    assert "note" not in (answer.trace or {})


async def test_where_only_unreadable_answers_have_a_score_they_win() -> None:
    aggregator = BestOf(parts())
    aggregator._reward = Table(**{"B": math.nan, "No comment.": 3.0})  # type: ignore[assignment]
    answer = await aggregator.aggregate(ask(CHOICE), DECISION, said(a="B", c="No comment."))
    assert answer.text == "No comment."


async def test_agreement_likes_the_answer_in_the_middle() -> None:
    reward = Agreement(parts())
    answers = said(a="The moon is a dead rock.", b="The moon is a rock.", c="Buy my crypto coins today!")
    scores = [s.value for s in await reward.score(ask(), answers)]
    assert scores[2] == min(scores)
    assert await reward.score(ask(), answers[:1]) == [Score(value=0.0)]


def test_rewards_are_chosen_by_name() -> None:
    assert BestOf(parts(), reward="agreement")._reward.name == "agreement"
    with pytest.raises(ConfigError, match="no reward 'beauty'; known: agreement"):
        BestOf(parts(), reward="beauty")


TEXTS = st.sampled_from(["x", "y", "z", "", "nan"])


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), data=st.data())
def test_the_order_of_the_answers_never_matters(texts: list[str], data: st.DataObject) -> None:
    answers = [replace(said(a=t)[0], expert_id="abcde"[i]) for i, t in enumerate(texts)]
    reward = Table(x=0.2, y=0.5, z=0.5, nan=math.nan, **{"": 0.9})
    shuffled = data.draw(st.permutations(answers))
    assert asyncio.run(pick(reward, shuffled)) == asyncio.run(pick(reward, answers))
