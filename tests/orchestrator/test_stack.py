"""The stack as the service uses it: requests in, one answer and its account out."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from experts.types import Completion, Message, Request
from orchestrator.aggregators.stack import Stacked
from orchestrator.aggregators.stacking import artefact
from orchestrator.aggregators.stacking.build import Wish, decide
from orchestrator.aggregators.stacking.recorded import read_recorded, rows_of
from orchestrator.build import make_aggregator
from orchestrator.config import AggregatorConfig
from routers.base import RouteDecision
from routers.static import WordLlama
from tests.orchestrator.planted import RATES, write_pool
from tests.orchestrator.served import fake_config, serving

QUESTION = "What is 4 and a bit?\nA. 12 apples\nB. 13 apples\nC. 14 apples\nD. 15 apples\nE. 16 apples"
DECISION = RouteDecision(expert_ids=tuple(RATES), weights=(0.25,) * 4, scores={}, reason="", router="x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recorded = read_recorded(write_pool(tmp_path_factory.mktemp("pool")))
    out = tmp_path_factory.mktemp("stack")
    artefact.save(artefact.fit(recorded, rows_of(recorded, ["train"]), Wish(calls=2.0, with_prior=False)), out)
    return out


def make(folder: Path | None, experts: tuple[str, ...] = tuple(RATES), **options: object) -> Stacked:
    config = AggregatorConfig(name="stack", artefact=folder, options=options)
    aggregator = make_aggregator(config, dict.fromkeys(experts), WordLlama)  # type: ignore[arg-type]
    assert isinstance(aggregator, Stacked)
    return aggregator


def ask(question: str = QUESTION, **metadata: object) -> Request:
    return Request(request_id="r", messages=(Message(role="user", content=question),), metadata=metadata)


def said(**texts: str) -> list[Completion]:
    return [Completion(request_id="r", expert_id=e, text=t) for e, t in texts.items()]


def finish(step):  # type: ignore[no-untyped-def]
    """The stack waits for nothing, so that one step ends it."""
    with pytest.raises(StopIteration) as ended:
        step.send(None)
    return ended.value.value


def combine(stack: Stacked, answers: list[Completion], request: Request | None = None) -> Completion:
    return finish(stack.aggregate(request or ask(), DECISION, answers))


def settled(stack: Stacked, answers: list[Completion], pending: list[str]) -> bool:
    return finish(stack.settled(ask(), DECISION, answers, pending))


def test_one_good_expert_outweighs_two_bad_ones(folder: Path) -> None:
    result = combine(make(folder), said(ace="It is (B).", poor="Answer: C", noise="The answer is (C)."))
    trace = result.trace
    assert result.expert_id == "ace"
    assert trace["winner"] == "B"
    assert sum(trace["posterior"].values()) == pytest.approx(1, abs=1e-4)
    assert max(trace["posterior"], key=trace["posterior"].get) == "B"
    counts = {a["expert_id"]: a["weight"] for a in trace["answers"]}
    assert counts["ace"] > counts["poor"] > counts["noise"]


def test_the_better_of_those_that_agree_speaks(folder: Path) -> None:
    assert combine(make(folder), said(noise="The answer is (B).", ace="The answer is (B).")).expert_id == "ace"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_order_of_the_answers_does_not_matter(folder: Path, data: st.DataObject) -> None:
    letters = st.sampled_from(["The answer is (A).", "The answer is (B).", "Answer: C", "no idea", ""])
    answers = said(**{e: data.draw(letters) for e in RATES})
    stack = make(folder)
    straight, turned = combine(stack, answers), combine(stack, data.draw(st.permutations(answers)))
    assert straight == turned


def test_what_cannot_be_read_counts_for_nothing(folder: Path) -> None:
    result = combine(make(folder), said(ace="", fair="well", noise="The answer is (D)."))
    assert result.trace["winner"] == "D"
    assert [a["weight"] for a in result.trace["answers"] if a["expert_id"] != "noise"] == [0.0, 0.0]


def test_when_nothing_can_be_read_the_expert_worth_most_is_taken(folder: Path) -> None:
    result = combine(make(folder), said(noise="", ace="hmm", fair="what?"))
    assert result.expert_id == "ace"
    assert "no answer could be read" in result.trace["note"]
    assert result.trace["winner"] is None


def test_ties_are_decided_by_the_seed_and_always_alike(folder: Path) -> None:
    stack = make(folder)
    answers = [replace(c, index=i) for i, c in enumerate(said(a="The answer is (A).", b="The answer is (C)."))]
    winners = {
        seed: [combine(stack, order, ask(route_seed=seed)).text for order in (answers, answers[::-1])]
        for seed in range(12)
    }
    assert all(one == other for one, other in winners.values())
    assert len({one for one, _ in winners.values()}) == 2
    assert "decided by seed" in combine(stack, answers).trace["note"]


def test_an_expert_it_never_saw_is_the_weakest_it_knows(folder: Path) -> None:
    stack = make(folder, (*RATES, "stranger"))
    result = combine(stack, said(stranger="The answer is (A).", ace="The answer is (B)."))
    counts = {a["expert_id"]: a["weight"] for a in result.trace["answers"]}
    known = combine(stack, said(noise="The answer is (A).", ace="The answer is (B).")).trace["answers"]
    assert counts["stranger"] == next(a["weight"] for a in known if a["expert_id"] == "noise")
    assert "never saw stranger" in result.trace["note"]


def test_names_say_who_is_who(folder: Path) -> None:
    stack = make(folder, ("mine", "yours"), names={"mine": "ace", "yours": "noise"})
    assert combine(stack, said(yours="The answer is (A).", mine="The answer is (B).")).expert_id == "mine"


@pytest.mark.parametrize(
    ("options", "experts", "message"),
    [
        ({}, ("nobody",), "knows none of the experts"),
        ({"names": {"ghost": "ace"}}, ("ace",), "no experts here"),
        ({"names": {"mine": "ghost"}}, ("mine",), "never saw"),
        ({"threshold": 2.0}, ("ace",), "from 0 to 1"),
        ({"least_gain": 1.5}, ("ace",), "-1 to 1"),
        ({"treshold": 0.5}, ("ace",), "threshold"),
        ({"extract": "smell"}, ("ace",), "no kind"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder: Path, options, experts, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        make(folder, experts, **options)


def test_without_an_artefact_it_says_how_to_make_one() -> None:
    with pytest.raises(ConfigError, match="collegium build stack"):
        make(None)


def test_it_stops_once_an_option_is_likelier_than_the_threshold(folder: Path) -> None:
    one, two = said(ace="The answer is (B)."), said(ace="The answer is (B).", fair="The answer is (B).")
    split = said(ace="The answer is (B).", fair="The answer is (C).")
    stack = make(folder, threshold=0.9)
    assert not settled(stack, [], ["ace"])
    assert not settled(stack, one, ["fair"])
    assert settled(stack, two, ["poor"])
    assert not settled(stack, split, ["poor"])
    assert settled(stack, split, [])
    assert not settled(stack, said(ace="who knows"), ["fair"])
    assert settled(make(folder, threshold=0.0), one, ["fair"])


def test_it_stops_where_the_next_are_not_expected_to_change_anything(folder: Path) -> None:
    one, two = said(ace="The answer is (B)."), said(ace="The answer is (B).", fair="The answer is (B).")
    split = said(ace="The answer is (B).", fair="The answer is (C).")
    stack = make(folder, least_gain=0.03)
    assert settled(stack, two, ["noise"]), "noise cannot turn two good ones"
    assert not settled(stack, split, ["fair", "poor"])
    assert not settled(stack, said(ace="who knows"), ["noise"])
    assert settled(make(folder, least_gain=1.0), one, ["fair"])
    assert not settled(make(folder, least_gain=-1.0), two, ["noise"])
    assert combine(stack, two).trace["least_gain"] == 0.03


def test_open_answers_are_compared_by_value(folder: Path) -> None:
    answers = said(ace="So 1,000 in all. The answer is 1000.", fair="The answer is 7.", poor="The answer is 1000.0")
    result = combine(make(folder), answers, ask("How many grams are in a kilogram?"))
    assert result.expert_id == "ace"
    assert result.trace["winner"] == "1000"
    assert set(result.trace["posterior"]) == {"1000", "7", "(none of these)"}


def test_it_answers_over_http_and_explains(folder: Path) -> None:
    config = fake_config(
        {
            "engines": {
                "a": {"backend": "fake", "options": {"text": "The answer is (B)."}},
                "b": {"backend": "fake", "options": {"text": "The answer is (C)."}},
            },
            "experts": {"ace": {"engine": "a"}, "poor": {"engine": "b"}, "noise": {"engine": "b"}},
            "policies": {
                "default": {"router": "always"},
                "stacked": {"router": "always", "top_k": 3, "aggregator": {"name": "stack", "artefact": str(folder)}},
            },
        }
    )
    body = {
        "model": "collegium",
        "messages": [{"role": "user", "content": QUESTION}],
        "collegium": {"top_k": 3, "aggregator": "stack", "explain": True},
    }
    with serving(config) as served:
        reply = served.http.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == "The answer is (B)."
    assert reply["collegium"]["trace"]["winner"] == "B"
    assert len(reply["collegium"]["calls"]) == 3


def test_the_command_fits_one_and_says_how_to_use_it(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from orchestrator.cli import app

    pool = write_pool(tmp_path / "pool", questions=120)
    out = tmp_path / "stack"
    result = CliRunner().invoke(app, ["build", "stack", "--pool", str(pool), "--out", str(out), "--calls", "2"])
    assert result.exit_code == 0, result.output
    assert re.search(r"fitted on 96 questions.*ace", result.output, re.DOTALL)
    assert artefact.load(out).calls == 2.0
    assert "Example" in CliRunner().invoke(app, ["build", "stack", "--help"]).output


def test_a_request_is_weighed_as_the_recorded_question_is(tmp_path: Path) -> None:
    """Options, words and similar questions are read from the request's own text: what was fitted must meet the same."""
    recorded = read_recorded(write_pool(tmp_path / "pool", questions=60))
    fitted = artefact.fit(recorded, rows_of(recorded, ["train"]), Wish())
    artefact.save(fitted, tmp_path / "stack")
    stack, rows = make(tmp_path / "stack"), rows_of(recorded, ["test"])[:4]
    prepared = fitted.stack.prepare(recorded.ballots.take(rows), recorded.options.take(rows))
    due_QO = fitted.stack.logit.posterior(prepared)
    assert decide(fitted.stack.logit, prepared)[1].max() > 0.5
    for place, row in enumerate(rows):
        number = int(recorded.records.question_ids[row][1:])
        options = [f"{number * 3 + o} apples" for o in range(5)]
        lettered = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=True))
        votes = recorded.ballots.votes_QE[row]
        texts = {
            e: f"It follows. The answer is ({'ABCDE'[v]})." if v >= 0 else "I cannot say."
            for e, v in zip(RATES, votes, strict=True)
        }
        request = ask(f"What is {number} and a bit?\n{lettered}", task=recorded.records.tasks[row])
        found = combine(stack, said(**texts), request).trace["posterior"]
        assert list(found.values()) == pytest.approx(due_QO[place, :5].tolist(), abs=1e-4)
