import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError, ExpertFailed
from experts.types import Completion
from orchestrator.aggregators.general_expert import GeneralExpert
from orchestrator.aggregators.labels import checked_labels, read_label
from tests.orchestrator.aggregators.scripted import Scripted, always, ask, broken, decided, parts, said

DECISION = decided(news=3, market=2, alpha=1)
REPORTS = said(news="Earnings beat: Rise.", market="Volume dries up. Fall.", alpha="Momentum says Rise")
MOVES = ["Rise", "Fall"]


async def decide(*experts: Scripted, answers: Sequence[Completion] = REPORTS, **options: Any) -> Completion:
    aggregator = GeneralExpert(parts(*experts), expert=experts[0].spec.expert_id, **options)
    return await aggregator.aggregate(ask("Will ACME rise or fall?"), DECISION, answers)


# Labels


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Rise", "Rise"),
        ("**fall**", "Fall"),
        ("It may fall first, but the answer is Rise.", "Rise"),
        ("Reasons to rise, reasons to fall.\nFall", "Fall"),
        ("<think>Fall? Fall.</think>Rise", "Rise"),
        ("It will rise or fall", None),
        ("Enterprise value", None),
        ("", None),
    ],
)
def test_a_label_is_read_where_there_is_one(text: str, label: str | None) -> None:
    assert read_label(text, MOVES) == label


def test_a_label_inside_a_longer_one_is_not_meant() -> None:
    labels = ["strong up", "up", "no change"]
    assert read_label("Strong  up.", labels) == "strong up"
    assert read_label("It goes up.", labels) == "up"


@pytest.mark.parametrize("labels", ["Rise", ["Rise"], ["Rise", "rise "], ["Rise", ""]])
def test_labels_that_cannot_be_told_apart_are_refused(labels: Any) -> None:
    with pytest.raises(ValueError, match="two or more different words"):
        checked_labels(labels)


# Prediction


async def test_one_expert_decides_on_all_reports() -> None:
    general = always("g", "On balance: Rise.")
    answer = await decide(general, labels=MOVES)
    assert (answer.expert_id, answer.text) == ("g", "Rise")
    assert answer.trace == {
        "mode": "predict",
        "expert": "g",
        "answers": [
            {"expert_id": "news", "chars": 20, "read": 20},
            {"expert_id": "market", "chars": 22, "read": 22},
            {"expert_id": "alpha", "chars": 18, "read": 18},
        ],
        "label": "Rise",
    }
    (asked,) = general.requests
    assert all(text in asked.question for text in ("Will ACME", "Earnings beat", "Volume dries", "one of: Rise"))
    assert (asked.params.temperature, asked.params.max_tokens) == (0.0, 256)


async def test_without_labels_it_answers_in_words() -> None:
    answer = await decide(always("g", "Up, I would say."))
    assert (answer.text, answer.trace and "label" in answer.trace) == ("Up, I would say.", False)


async def test_reports_are_summarised_by_an_expert_or_cut() -> None:
    general = always("g", "Rise")
    summariser = Scripted("s", lambda p: ExpertFailed("no") if "Volume" in p else "SHORT")
    answers = [*REPORTS[:2], replace(REPORTS[2], text="x" * 9000)]
    answer = await decide(general, summariser, answers=answers, labels=MOVES, summariser="s", report_chars=200)
    assert answer.trace is not None
    assert [a["read"] for a in answer.trace["answers"]] == [5, 22, 5]
    assert answer.trace["answers"][1]["note"] == "not summarised (expert_failed)"
    assert general.prompts[0].count("SHORT") == 2
    assert "Volume dries up" in general.prompts[0]
    general = always("g", "Rise")
    await decide(general, answers=answers, labels=MOVES, report_chars=200)
    assert len(general.prompts[0]) < 1500
    assert "8800 characters left out" in general.prompts[0]


@pytest.mark.parametrize("general", [broken("g"), always("g", "Rise or Fall"), always("g", "")])
async def test_where_it_decides_nothing_the_reports_vote_by_label(general: Scripted) -> None:
    answer = await decide(general, labels=MOVES)
    assert answer.text == "Rise"
    assert answer.trace is not None
    assert answer.trace["votes"] == pytest.approx({"Rise": 4 / 6, "Fall": 2 / 6})
    assert answer.trace["note"] == "the general expert failed (expert_failed): the reports vote"


async def test_reports_without_a_label_still_make_one_answer() -> None:
    answer = await decide(broken("g"), answers=said(news="no idea", market=""), labels=MOVES)
    assert answer.text == "no idea"
    assert answer.trace is not None
    assert "no answer could be read" in answer.trace["note"]


async def test_no_reports_at_all_ask_nobody() -> None:
    general = always("g", "Rise")
    answer = await decide(general, answers=said(news="", market=" "), labels=MOVES)
    assert answer.text == ""
    assert general.requests == []


# Ranking


def by_length(prompt: str) -> str:
    """Prefers the longer answer."""
    blocks = prompt.split("[Answer ")[1:]
    first, second = (block.split("\n[end of")[0] for block in blocks)
    return "A" if len(first) > len(second) else "B"


async def test_the_answer_that_wins_most_comparisons_is_given() -> None:
    general = Scripted("g", by_length)
    answer = await decide(general, answers=said(news="..", market="....", alpha="."), mode="rank")
    assert (answer.expert_id, answer.text) == ("market", "....")
    assert answer.trace == {
        "mode": "rank",
        "expert": "g",
        "answers": [
            {"expert_id": "news", "wins": 2.0},
            {"expert_id": "market", "wins": 4.0},
            {"expert_id": "alpha", "wins": 0.0},
        ],
    }
    assert len(general.requests) == 6  # each pair in both orders


async def test_a_judge_who_prefers_the_first_place_makes_all_equal_and_the_better_ranked_wins() -> None:
    answer = await decide(always("g", "A"), answers=said(alpha="x", market="y", news="z"), mode="rank")
    assert answer.expert_id == "news"
    assert answer.trace is not None
    assert {a["wins"] for a in answer.trace["answers"]} == {2.0}


async def test_a_judge_who_says_neither_is_a_tie() -> None:
    answer = await decide(always("g", "It is a tie, both are good"), answers=said(news="x", alpha="y"), mode="rank")
    assert answer.expert_id == "news"


async def test_comparisons_that_fail_are_ties_and_none_at_all_is_a_vote() -> None:
    general = Scripted("g", lambda p: ExpertFailed("no") if "....\n" in p else by_length(p))
    answer = await decide(general, answers=said(news=".", market="..", alpha="...."), mode="rank")
    assert answer.expert_id == "market"
    assert answer.trace is not None
    assert answer.trace["note"] == "4 of 6 comparisons failed and count as ties"
    answer = await decide(broken("g"), mode="rank")
    assert answer.trace is not None
    assert answer.trace["note"].startswith("the general expert failed (expert_failed): a weighted vote instead")


async def test_never_more_calls_at_once_than_allowed() -> None:
    general = Scripted("g", by_length)
    answers = [replace(said(x="." * i)[0], expert_id=f"e{i}") for i in range(1, 7)]
    await decide(general, answers=answers, mode="rank", at_once=3)
    assert (general.most, len(general.requests)) == (3, 30)


async def test_one_answer_is_compared_with_nobody() -> None:
    general = always("g", "A")
    answer = await decide(general, answers=said(alpha="x", news=""), mode="rank")
    assert (answer.text, general.requests) == ("x", [])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"expert": "nobody"}, ConfigError, "names 'nobody'"),
        ({"expert": "g", "summariser": "nobody"}, ConfigError, "names 'nobody'"),
        ({"expert": "g", "mode": "guess"}, ValueError, "predict or rank"),
        ({"expert": "g", "at_once": 0}, ValueError, "at least 1"),
        ({"expert": "g", "labels": ["one"]}, ValueError, "two or more"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        GeneralExpert(parts(always("g", "")), **options)


@settings(deadline=None, max_examples=40)
@given(order=st.permutations(REPORTS), mode=st.sampled_from(["predict", "rank"]))
def test_the_order_of_the_answers_never_matters(order: list[Completion], mode: Any) -> None:
    general = Scripted("g", lambda p: by_length(p) if "[Answer" in p else ("Rise" if len(p) % 2 else "Fall"))

    def run(answers: Sequence[Completion]) -> Completion:
        answer = asyncio.run(decide(general, answers=answers, mode=mode, labels=MOVES))
        return replace(answer, ttft_s=0, latency_s=0)

    assert run(order) == run(REPORTS)
