"""collegium eval run: from questions and a config to a report, and to a recorded pool that routers can be fitted on."""

import gzip
import json
import sys

import pytest
from typer.testing import CliRunner

from evals.generation.answers import Answers, key_of
from evals.generation.measures import table
from evals.generation.questions import Question, read_questions, sample
from evals.generation.recording import splits
from evals.generation.remembering import Remembering
from evals.generation.run import Given, Outcome
from evals.generation.scorers import kind_of, score
from experts.base import collect
from experts.errors import BadRequest, ConfigError, ExpertFailed
from experts.fake import FakeEngine
from experts.pools import RecordedAnswer
from experts.types import Completion, EngineSpec, ExpertSpec, Message, Request, SamplingParams
from orchestrator.aggregators.vote import Vote
from orchestrator.cli import app

ROWS = [
    {"id": f"q{i}", "task": "sums", "question": f"What is {i} + 2?", "options": None, "answer": str(i + 2)}
    for i in range(6)
]
CONFIG = """
engines:
  a: {backend: fake, options: {text: "The answer is 4."}}
  b: {backend: fake, options: {text: "The answer is 5.", fail: FAIL}}
experts: {four: {engine: a, usd_per_mtok_out: 1}, five: {engine: b}}
policies: {default: {router: always, top_k: 2, aggregator: vote}}
"""


def question(answer="4", kind="number", text="What is it?", **fields):
    return Question(question_id="q", task="t", text=text, kind=kind, answer=answer, **fields)


@pytest.fixture
def file(tmp_path):
    def make(rows=ROWS):
        path = tmp_path / "questions.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        return path

    return make


@pytest.fixture
def run(tmp_path, file):
    def invoke(*words, fail="[ok]", rows=ROWS, out="out"):
        (tmp_path / "collegium.yaml").write_text(CONFIG.replace("FAIL", fail))
        base = ["eval", "run", "--questions", file(rows), "-c", tmp_path / "collegium.yaml", "--out", tmp_path / out]
        return CliRunner().invoke(app, [str(word) for word in (*base, *words)])

    return invoke


def report(tmp_path, out="out"):
    found = json.loads((tmp_path / out / "report.json").read_text())
    return found, {row["name"]: row for row in found["rows"]}


def test_the_policy_stands_beside_what_it_has_to_beat(run, tmp_path):
    result = run()
    assert result.exit_code == 0, result.output
    found, rows = report(tmp_path)
    names = ["policy", "best single", "best in hindsight", "self-consistency", "majority, same calls"]
    assert list(rows) == [*names, "majority of all", "oracle", "four", "five"]
    assert rows["oracle"]["accuracy"] == pytest.approx(2 / 6)  # 2+2 and 3+2
    assert rows["four"]["accuracy"] == rows["five"]["accuracy"] == pytest.approx(1 / 6)
    assert rows["policy"]["mean_calls"] == 2
    assert rows["four"]["mean_calls"] == 1
    assert rows["policy"]["mean_tokens"] == pytest.approx(rows["four"]["mean_tokens"] + rows["five"]["mean_tokens"])
    assert rows["policy"]["mean_usd"] == pytest.approx(rows["four"]["mean_usd"])
    assert rows["four"]["mean_usd"] > 0
    assert rows["policy"]["verdict"] == "does not help"
    assert found["loads"] == 2 + 1  # the samples come from an engine that had made way for the other
    assert found["scorers"] == {"number": 6}
    assert (tmp_path / "out" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert "| policy |" in (tmp_path / "out" / "report.md").read_text()
    line = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[2])
    assert line["right"] == "4"
    assert line["experts"]["four"] == {"answer": "4", "score": 1.0, "error": None}


def test_without_matplotlib_there_is_a_report_and_no_picture(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run().exit_code == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"report.json", "report.md"}
    assert not (tmp_path / "out" / "accuracy.png").exists()


def test_run_again_it_asks_nothing_twice(run, tmp_path):
    run()
    first = report(tmp_path)[1]
    again = run()
    found, rows = report(tmp_path)
    assert again.exit_code == 0
    assert found["loads"] == 0
    assert rows == first


def test_what_was_not_answered_is_asked_again_and_only_that(run, tmp_path):
    run("--limit", "3")
    before = len(Answers(tmp_path / "out" / "answers.sqlite"))
    run()
    assert before < len(Answers(tmp_path / "out" / "answers.sqlite"))
    assert report(tmp_path)[0]["questions"] == 6


def test_an_expert_that_fails_costs_its_answers_and_nothing_else(run, tmp_path):
    assert run(fail="[refuse]").exit_code == 0
    rows = report(tmp_path)[1]
    assert rows["five"]["failed"] == 6
    assert rows["five"]["accuracy"] == 0
    assert rows["four"]["failed"] == 0
    assert rows["policy"]["failed"] == 0
    assert rows["policy"]["mean_calls"] == 1


def test_a_run_in_which_nobody_answers_is_no_result(run, tmp_path):
    """As of a pool that holds scores only: not a policy that scores 0."""
    (tmp_path / "mute.yaml").write_text(CONFIG.replace("FAIL", "[refuse]").replace('4."', '4.", fail: [refuse]'))
    result = run("-c", tmp_path / "mute.yaml")
    assert result.exit_code == 1
    assert "No expert answered any of 6 questions" in result.output
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_recorded_pool_can_be_routed_and_replayed(run, tmp_path):
    rows = [{**ROWS[i % 6], "id": f"q{i}", "question": f"Case {i}. {ROWS[i % 6]['question']}"} for i in range(30)]
    assert run("--record", tmp_path / "pool", rows=rows).exit_code == 0
    words = ["eval", "routing", "--pool", tmp_path / "pool", "--router", "task", "--encoder", "wordllama"]
    routed = CliRunner().invoke(app, [str(w) for w in (*words, "--out", tmp_path / "routing")])
    assert routed.exit_code == 0, routed.output
    replay = ["eval", "run", "--pool", tmp_path / "pool", "--split", "test", "--out", tmp_path / "replay"]
    played = CliRunner().invoke(app, [str(w) for w in replay])
    assert played.exit_code == 0, played.output
    found, again = report(tmp_path, "replay")
    assert found["questions"] == 9
    assert "self-consistency" not in again
    refused = run("--record", tmp_path / "pool", rows=rows)
    assert refused.exit_code == 1
    assert "holds a recorded pool already" in refused.output


def test_splits_keep_each_tasks_shares():
    questions = [question(kind="number") for _ in range(0)] + [
        Question(question_id=f"{task}{i}", task=task, text="?", kind="number", answer="1")
        for task in ("a", "b")
        for i in range(10)
    ]
    found = splits(questions, 0)
    assert {name: len(ids) for name, ids in found.items()} == {"train": 12, "val": 2, "test": 6}
    assert sorted(i for ids in found.values() for i in ids) == sorted(q.question_id for q in questions)
    assert splits(questions[::-1], 0).keys() == found.keys()


# Questions


def test_the_answer_may_be_given_by_wording(file):
    row = {"id": "1", "task": "t", "question": "Is it?", "options": ["Yes", "No"], "answer": "No"}
    (one,) = read_questions(file([row]))
    assert (one.kind, one.answer) == ("letter", "B")
    assert "B. No" in one.prompt
    assert one.prompt.startswith("Is it?")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"answer": "12", "options": None}, "number"),
        ({"answer": "1.2e-6", "options": None}, "number"),
        ({"answer": "(B)", "options": None}, "letter"),
        ({"answer": "C", "options": ["x", "y", "z"]}, "letter"),
        ({"answer": "AC", "options": ["x", "y", "z"]}, "letters"),
        ({"answer": "2", "options": None, "level": "Level 3"}, "boxed"),
        ({"answer": "\\frac{1}{2}", "options": None}, "boxed"),
        ({"answer": "nan", "options": None}, "exact"),
        ({"answer": "x", "options": None, "tests": "def check(f): pass"}, "code"),
    ],
)
def test_each_kind_of_question_has_its_scorer(row, kind):
    assert kind_of(row) == kind


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"id": "1", "question": "?", "answer": None}, "row 2: 'answer' is a text"),
        ({"id": "1", "question": " ", "answer": "1"}, "row 2: 'question' is a text"),
        ({"id": "q0", "question": "?", "answer": "1"}, "row 2: the id 'q0' was given already"),
        ({"id": "1", "question": "?", "answer": "1", "options": "ab"}, "row 2: 'options' is a list"),
        ({"id": "1", "question": "?", "answer": "maybe", "options": ["yes", "no"]}, "neither a letter nor one"),
        ({"id": "1", "question": "?", "answer": "C", "options": ["yes", "no"]}, "neither a letter nor one"),
    ],
)
def test_a_bad_row_is_named(file, row, why):
    with pytest.raises(ConfigError, match=why):
        read_questions(file([ROWS[0], row]))


def test_mistakes_on_the_command_line_are_explained(run, tmp_path, file):
    assert "No scorer 'best'" in run("--scorer", "best").output
    assert "No router 'nobody'" in run("--router", "nobody").output
    alone = CliRunner().invoke(app, ["eval", "run", "--questions", str(file()), "--out", str(tmp_path / "o")])
    assert alone.exit_code == 1
    assert "-c collegium.yaml" in alone.output
    (tmp_path / "taken").write_text("a file")
    assert "Choose another --out" in run(out="taken").output


def test_a_sample_is_drawn_by_its_seed():
    questions = [question(answer=str(i)) for i in range(20)]
    assert sample(questions, 5, 1) == sample(questions, 5, 1) != sample(questions, 5, 2)
    assert sample(questions, 50, 1) == questions


# Scorers


@pytest.mark.parametrize(
    ("asked", "text", "points"),
    [
        (question("B", "letter", options=("x", "y")), "So the answer is (B).", 1),
        (question("B", "letter", options=("x", "y")), "The answer is (A).", 0),
        (question("B", "letter", options=("x", "y")), "", 0),
        (question("AC", "letters"), "The answer is A and C.", 1),
        (question("AC", "letters"), "The answer is AC", 1),
        (question("AC", "letters"), "The answer is A.", 0),
        (question("1,200"), "It makes $1200.", 1),
        (question("1.20156e+06"), "The answer is 1201561", 1),
        (question("18"), "The answer is 19", 0),
        (question("\\frac{1}{2}", "boxed"), "so \\boxed{\\dfrac12}", 1),
        (question("\\frac{1}{2}", "boxed"), "no box at all", 0),
        (question("True", "exact"), "Thus the answer is true.", 1),
        (question("True", "exact"), "False", 0),
        (question("red fox", "contains"), "I saw a Red Fox there", 1),
        (question("fox", "contains"), "foxes", 0),
    ],
)
async def test_scorers(asked, text, points):
    assert (await score(text, asked))[1] == points


async def test_a_recorded_answer_keeps_its_verdict():
    """The recorded grade stands, also of an answer that was cut where another question began."""
    kept = RecordedAnswer(text="It is 5.\nQuestion: and 4?", answer="5", score=1.0, completion_chars=9, usd=None)
    asked = question("5", recorded=(kept,))
    assert await score("It is 5.", asked) == ("5", 1.0)
    assert await score("It is 6.", asked) == ("6", 0.0)
    assert await score("", asked) == (None, 0.0)


SQUARE = question(
    kind="code",
    text='import math\n\ndef square(x):\n    """Its square."""\n',
    tests="def check(f):\n    assert f(3) == 9\n    assert f(-2) == 4\n",
    entry_point="square",
)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("```python\ndef square(x):\n    return x * x\n```", 1),
        ("def square(x):\n    return x * x", 1),
        ("    return x * x\n", 1),
        ("```python\ndef square(x):\n    return math.prod([x, x])\n```", 1),
        ("```python\ndef square(x):\n    return 9\n```", 0),
        ("```python\nraise SystemExit(0)\ndef square(x): pass\n```", 0),
        ("```python\nimport os\nos._exit(0)\ndef square(x): pass\n```", 0),
        ("no code", 0),
        ("", 0),
    ],
)
async def test_code_is_run(text, points):
    assert (await score(text, SQUARE))[1] == points


# What an engine is asked


async def test_an_engine_loads_only_for_what_is_not_on_disk(tmp_path):
    spec = EngineSpec(engine_id="a", backend="fake", model="fake", options={"text": "four"})
    expert, request = ExpertSpec(expert_id="x", engine_id="a"), Request(prompt="2 + 2")
    told = []
    for loads in (1, 0):
        engine = Remembering(FakeEngine(spec), Answers(tmp_path / "a.sqlite"), lambda *call: told.append(call))
        await engine.load()
        answer = await collect(engine.generate(request, expert), request)
        await engine.unload()
        assert (answer.text, engine.loads) == ("four", loads)
    assert len(told) == 2
    assert told[0][1] == told[1][1] > 0


def test_an_answers_key_is_all_that_it_depends_on():
    engine = EngineSpec(engine_id="a", backend="vllm", model="m")
    expert = ExpertSpec(expert_id="x", engine_id="a")
    base = Request(messages=(Message(role="user", content="hi"),))
    same = Request(messages=(Message(role="user", content="hi"),), metadata={"question_id": "7"}, stream=False)
    assert key_of(engine, expert, base) == key_of(engine, expert, same)
    others = [
        (EngineSpec(engine_id="a", backend="vllm", model="n"), expert, base),
        (EngineSpec(engine_id="a", backend="vllm", model="m", options={"seed": 1}), expert, base),
        (engine, ExpertSpec(expert_id="x", engine_id="a", adapter="loud"), base),
        (engine, expert, Request(messages=(Message(role="system", content="hi"),))),
        (engine, expert, Request(prompt="hi")),
        (engine, expert, Request(messages=base.messages, params=SamplingParams(seed=1))),
        (engine, expert, Request(messages=base.messages, params=SamplingParams(more={"top_k": 1}))),
    ]
    assert len({key_of(engine, expert, base), *(key_of(*other) for other in others)}) == 1 + len(others)


def test_answers_that_were_kept_before_are_still_found():
    """The key as it was before SamplingParams had ``more``."""
    engine = EngineSpec(engine_id="e", backend="vllm", model="m", options={"max_model_len": 64})
    params = SamplingParams(temperature=0.0, max_tokens=8)
    asked = Request(messages=(Message(role="user", content="hi"),), params=params)
    found = key_of(engine, ExpertSpec(expert_id="x", engine_id="e"), asked)
    assert found.hex() == "dca3f28bf59d9efb70166490775b9cc5"


async def test_a_failure_is_not_remembered(tmp_path):
    spec = EngineSpec(engine_id="a", backend="fake", model="fake", options={"fail": ["cut", "ok"]})
    engine = Remembering(FakeEngine(spec), Answers(tmp_path / "a.sqlite"), lambda *_: None)
    expert, request = ExpertSpec(expert_id="x", engine_id="a"), Request(prompt="2 + 2")
    with pytest.raises(ExpertFailed):
        await collect(engine.generate(request, expert), request)
    assert (await collect(engine.generate(request, expert), request)).text
    many = Request(prompt="2 + 2", params=SamplingParams(n=2))
    with pytest.raises(BadRequest):
        await collect(engine.generate(many, expert), many)


# The table


def given(right, text="4"):
    said = Completion(request_id="r", expert_id="x", text=text)
    return Given(answer=text, score=float(right), tokens=10, completion=said)


async def test_nobody_is_chosen_on_the_questions_he_is_judged_by():
    """Two experts who are right by luck: the better one in hindsight is above one half, the one chosen fairly is not
    above it by construction. Here each is right on just the half on which the other would be chosen."""
    import numpy as np

    count = 40
    first = np.zeros(count, bool)
    first[np.random.default_rng(0).permutation(count)[: count // 2]] = True
    experts = {"a": [given(h) for h in first], "b": [given(not h) for h in first]}
    outcome = Outcome(experts=experts, policy=experts["a"], sampled_expert="a", sampled=None)
    questions = [question() for _ in range(count)]
    request = lambda q: Request(prompt=q.text)  # noqa: E731
    rows = {row.name: row for row in await table(outcome, questions, 0, Vote(), request)}
    assert rows["best in hindsight"].accuracy.value == 0.5
    assert rows["best single"].accuracy.value == 0.0
    assert rows["oracle"].accuracy.value == 1.0
    assert rows["policy"].helps


async def test_answers_that_ended_at_their_token_limit_are_counted():
    """A low score may only mean that nobody was let speak out."""
    ends = {"a": ["length", "stop"], "b": ["length", "length"]}
    experts = {
        e: [
            Given(answer="4", score=1.0, completion=Completion(request_id="r", expert_id=e, text="4", finish_reason=f))
            for f in reasons
        ]
        for e, reasons in ends.items()
    }
    outcome = Outcome(experts=experts, policy=experts["a"], sampled_expert="a", sampled=None)
    request = lambda q: Request(prompt=q.text)  # noqa: E731
    rows = {row.name: row.cut_off for row in await table(outcome, [question()] * 2, 0, Vote(), request)}
    assert (rows["policy"], rows["a"], rows["b"], rows["majority of all"]) == (1, 1, 2, 0)


@pytest.mark.parametrize("said", [("3", "4"), ("4", "3")])
async def test_a_tie_of_the_majority_goes_to_the_best_and_not_by_lot(said):
    """Two experts that never agree: a majority that threw dice would be easier to beat than one of them alone."""
    experts = {
        name: [Given(answer=a, score=score, completion=Completion(request_id="r", expert_id=name, text=a))]
        for name, a, score in zip(("worse", "better"), said, (0.0, 1.0), strict=True)
    }
    outcome = Outcome(experts=experts, policy=experts["worse"], sampled_expert="better", sampled=None)
    request = lambda q: Request(prompt=q.text, metadata={"route_seed": 0})  # noqa: E731
    rows = {row.name: row for row in await table(outcome, [question()], 0, Vote(), request)}
    assert rows["majority of all"].accuracy.value == 1.0
