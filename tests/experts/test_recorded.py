import asyncio
import gzip
import json
import os
from pathlib import Path

import pytest

from experts import pools
from experts.base import collect, collect_choices
from experts.errors import ConfigError, ExpertFailed, Unavailable
from experts.recorded import PIECES, RecordedEngine
from experts.types import EngineSpec, ExpertSpec, Message, Request, SamplingParams, Usage
from orchestrator.build import build_service
from orchestrator.config import parse_config
from orchestrator.run import Run

QUESTIONS = [
    {"id": "q1", "question": "What is two plus two?", "options": None},
    {"id": "q2", "question": "Which is it?", "options": ["red", "green"]},
    {"id": "q3", "question": "Which is it?", "options": ["green", "red"]},
    {"id": "q4", "question": "Which is it?", "options": ["green", "red", "blue"]},
    {"id": "q5", "question": "Which is it?  And why?", "options": None},
]
ANSWERS = {
    "ann": [
        {"id": "q2", "text": "It is (A).", "answer": "A", "score": 1, "completion_chars": 400, "usd": 0.01},
        {"id": "q1", "text": "Two plus two makes four.", "answer": "4", "score": 1.0, "completion_chars": None},
        {"id": "q3", "text": None, "answer": "B", "score": 0.5, "completion_chars": None, "usd": None},
        {"id": "q4", "text": "q4's", "answer": None, "score": 0, "extra": "keys are allowed"},
        {"id": "q5", "text": "", "answer": None, "score": 0},
    ],
    "bob": [
        {"id": "q1", "text": "Four, says Bob.", "answer": "4", "score": 1},
        {"id": "q2", "text": None, "answer": None, "score": 0},
    ],
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))


@pytest.fixture
def pool(tmp_path):
    head = {"name": "small", "experts": [{"expert_id": e} for e in ANSWERS]}
    (tmp_path / "pool.json").write_text(json.dumps(head))
    write_rows(tmp_path / "questions.jsonl.gz", QUESTIONS)
    for expert_id, rows in ANSWERS.items():
        write_rows(tmp_path / "responses" / f"{expert_id}.jsonl.gz", rows)
    return tmp_path


@pytest.fixture
def engine(pool):
    return RecordedEngine(EngineSpec(engine_id="replay", backend="recorded", model=str(pool)))


ANN = ExpertSpec(expert_id="ann", engine_id="replay")
BOB = ExpertSpec(expert_id="bob", engine_id="replay")


def ask(text="What is two plus two?", **fields):
    return Request(messages=(Message(role="user", content=text),), **fields)


async def answer(engine, text="What is two plus two?", expert=ANN, **fields):
    request = ask(text, **fields)
    return await collect(engine.generate(request, expert), request)


async def test_an_expert_says_again_what_he_said(engine):
    await engine.load()
    completion = await answer(engine)
    assert completion.text == "Two plus two makes four."
    assert completion.expert_id == "ann"
    assert completion.finish_reason == "stop"
    assert (await answer(engine, expert=BOB)).text == "Four, says Bob."


async def test_the_answer_comes_in_pieces(engine):
    chunks = [chunk async for chunk in engine.generate(ask(), ANN)]
    assert len([c for c in chunks if c.text]) == PIECES
    assert chunks[-1].usage is not None
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["stop"]


async def test_tokens_are_counted_from_what_was_recorded(engine):
    assert (await answer(engine, "Which is it?\n(A) red\n(B) green")).usage == Usage(
        prompt_tokens=8, completion_tokens=100
    )
    assert (await answer(engine)).usage == Usage(prompt_tokens=6, completion_tokens=6)
    request = ask(params=SamplingParams(n=3))
    choices = await collect_choices(engine.generate(request, ANN), request)
    assert [c.text for c in choices] == ["Two plus two makes four."] * 3
    assert choices[0].usage.completion_tokens == 18


async def test_stop_sequences_end_it_as_they_would_have_ended_the_engine(engine):
    said = await answer(engine, params=SamplingParams(stop=("", "four", " makes", "never")))
    assert said.text == "Two plus two"
    assert said.usage.completion_tokens == 3


async def test_the_adapter_names_the_recorded_expert(engine):
    expert = ExpertSpec(expert_id="teacher", engine_id="replay", adapter="bob")
    completion = await answer(engine, expert=expert)
    assert (completion.expert_id, completion.text) == ("teacher", "Four, says Bob.")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is two plus two?", "Two plus two makes four."),
        ("  What is\ttwo\nplus two? ", "Two plus two makes four."),
        ("What is two plus two? Answer in a word.", "Two plus two makes four."),
        ("Which is it?\n(A) red\n(B) green", "It is (A)."),
        ("Which is it?\nA. red\nB. green\n", "It is (A)."),
        ("Which is it?\nA. green\nB. red", "B"),
        ("Which is it?\nA. green\nB. red\nC. blue", "q4's"),
        ("Which is it?\nA. yellow\nB. pink", "It is (A)."),
        ("Which is it?", "It is (A)."),
        ("Which is it? And why?", ""),
    ],
)
async def test_a_question_is_known_by_its_text(engine, text, found):
    assert (await answer(engine, text)).text == found


@pytest.mark.parametrize("question_id", ["q1", "q4"])
async def test_a_question_id_goes_before_the_text(engine, question_id):
    completion = await answer(engine, "anything", metadata={"question_id": question_id})
    assert completion.text == {row["id"]: row["text"] for row in ANSWERS["ann"]}[question_id]


@pytest.mark.parametrize(
    ("text", "fields", "expert"),
    [
        ("What is three plus three?", {}, ANN),
        ("What is two", {}, ANN),
        ("", {}, ANN),
        ("lone \ud800 surrogate", {}, ANN),
        ("What is two plus two?", {"metadata": {"question_id": "q9"}}, ANN),
        ("Which is it? And why?", {}, BOB),
        ("Which is it?", {}, BOB),
    ],
)
async def test_what_was_not_recorded_is_left_to_another_expert_and_is_no_fault_of_the_engine(
    engine, text, fields, expert
):
    with pytest.raises(Unavailable, match=expert.expert_id) as caught:
        await answer(engine, text, expert, **fields)
    assert caught.value.fallback
    assert not caught.value.retryable
    assert not isinstance(caught.value, ExpertFailed), "it would open the breaker of all the pool's experts"


async def test_in_the_service_the_next_best_expert_takes_over(pool):
    config = parse_config(
        {
            "engines": {"replay": {"backend": "recorded", "model": str(pool)}},
            "experts": {"b": {"engine": "replay", "adapter": "bob"}, "a": {"engine": "replay", "adapter": "ann"}},
            "policies": {"default": {"router": "always"}},
        }
    )
    service = build_service(config)
    for _ in range(20):
        request = ask("Which is it?")
        (completion,) = await service.orchestrator.complete(
            Run(request=request, policy=service.policies.resolve("collegium"))
        )
        assert (completion.expert_id, completion.text) == ("a", "It is (A).")
    assert service.breakers["replay"].state == "closed"


async def test_answers_are_read_when_first_asked_for_and_only_once(engine, monkeypatch):
    read, answers = [], pools.RecordedPool.answers
    monkeypatch.setattr(pools.RecordedPool, "answers", lambda pool, e: read.append(e) or answers(pool, e))
    await engine.load()
    assert read == []
    await asyncio.gather(*(answer(engine) for _ in range(5)))
    await answer(engine, expert=BOB)
    assert read == ["ann", "bob"]


async def test_unload_forgets_and_the_next_question_loads_again(engine, pool):
    await engine.unload()
    await answer(engine)
    await engine.unload()
    await engine.unload()
    write_rows(pool / "responses" / "ann.jsonl.gz", [{"id": "q1", "text": "new", "score": 1}])
    assert (await answer(engine)).text == "new"


async def test_an_expert_with_many_answers_gives_each_its_own(pool):
    write_rows(pool / "questions.jsonl.gz", [{"id": str(i), "question": f"number {i}"} for i in range(100)])
    rows = [{"id": str(i), "text": f"text {i}", "score": 1} for i in range(99, 0, -1)]
    write_rows(pool / "responses" / "ann.jsonl.gz", rows)
    answers = pools.RecordedPool(pool).answers("ann")
    assert [a and a.text for a in map(answers.get, range(100))] == [None, *(f"text {i}" for i in range(1, 100))]


async def test_scores_and_prices_are_kept_for_who_reads_the_pool(pool):
    recorded = pools.RecordedPool(pool)
    found = recorded.answers("ann").get(recorded.by_id("q2"))
    assert found == pools.RecordedAnswer(text="It is (A).", answer="A", score=1, completion_chars=400, usd=0.01)


async def test_an_expert_the_pool_does_not_have_is_a_mistake_in_the_config(engine):
    with pytest.raises(ConfigError, match="no expert 'carl'; known: ann, bob"):
        await answer(engine, expert=ExpertSpec(expert_id="carl", engine_id="replay"))


def test_options_are_refused():
    with pytest.raises(ConfigError, match=r"'replay'.*no options"):
        RecordedEngine(EngineSpec(engine_id="replay", backend="recorded", model="x", options={"speed": 2}))


GOOD = {"id": "q1", "text": "x", "score": 1}


@pytest.mark.parametrize(
    ("rows", "row", "words"),
    [
        ([GOOD, '{"id": "q2", "score": NaN}'], 2, "not JSON"),
        ([GOOD, '{"id": "q2", "score": 1e999}'], 2, "score|not JSON"),
        ([GOOD, "broken"], 2, "not JSON"),
        ([GOOD, '["q2"]'], 2, "not a JSON object"),
        ([GOOD, GOOD], 2, "'q1' is unknown, or was answered already"),
        ([{"id": "q9", "score": 1}], 1, "'q9' is unknown"),
        ([{"score": 1}], 1, "None is unknown"),
        ([{"id": 1, "score": 1}], 1, "'id' is a text, got 1"),
        ([{"id": "q1"}], 1, "'score' is a number from 0 to 1, got None"),
        ([{"id": "q1", "score": 1.5}], 1, "'score'"),
        ([{"id": "q1", "score": -1}], 1, "'score'"),
        ([{"id": "q1", "score": "1"}], 1, "'score'"),
        ([{"id": "q1", "score": True}], 1, "'score'"),
        ([{"id": "q1", "score": 1, "text": 5}], 1, "'text'"),
        ([{"id": "q1", "score": 1, "answer": 5}], 1, "'answer'"),
        ([{"id": "q1", "score": 1, "usd": -0.1}], 1, "'usd'"),
        ([{"id": "q1", "score": 1, "completion_chars": "4"}], 1, "'completion_chars'"),
    ],
)
async def test_a_bad_answer_is_named_by_file_and_row(engine, pool, rows, row, words):
    write_rows(pool / "responses" / "ann.jsonl.gz", rows)
    with pytest.raises(ConfigError, match=rf"ann\.jsonl\.gz, row {row}.*({words})"):
        await answer(engine)
    assert (await answer(engine, expert=BOB)).text == "Four, says Bob."


@pytest.mark.parametrize(
    ("rows", "row", "words"),
    [
        ([QUESTIONS[0], QUESTIONS[0]], 2, "'q1' is missing or was given already"),
        ([{"question": "no id"}], 1, "None is missing"),
        ([{"id": "q1", "question": ["x"]}], 1, "'question'"),
        ([{"id": "q1", "question": "x", "options": "AB"}], 1, "'options'"),
        ([{"id": "q1", "question": "x", "options": [1]}], 1, "'options'"),
        (["{"], 1, "not JSON"),
    ],
)
async def test_a_bad_question_is_named_by_file_and_row(engine, pool, rows, row, words):
    write_rows(pool / "questions.jsonl.gz", rows)
    with pytest.raises(ConfigError, match=rf"questions\.jsonl\.gz, row {row}.*{words}"):
        await engine.load()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pool.json", None, "Cannot read .*pool.json: No such file"),
        ("pool.json", b"{", r"pool\.json is not JSON"),
        ("pool.json", b"[]", "'experts' is a list"),
        ("pool.json", b'{"experts": []}', "'experts' is a list"),
        ("pool.json", b'{"experts": [{"expert_id": "ann"}, {"expert_id": "ann"}]}', "expert 2"),
        ("pool.json", b'{"experts": [{"expert_id": "../ann"}]}', "expert 1"),
        ("pool.json", b'{"experts": ["ann"]}', "expert 1"),
        ("questions.jsonl.gz", None, "Cannot read .*questions.jsonl.gz"),
        ("questions.jsonl.gz", b"plain text", "questions.jsonl.gz is not gzip"),
        ("questions.jsonl.gz", gzip.compress(b'{"id": "1", "question": "x"}\n' * 1)[:-12], "not gzip, or cut off"),
        ("responses/ann.jsonl.gz", None, "Cannot read .*ann.jsonl.gz"),
        ("responses/ann.jsonl.gz", b"", None),
    ],
)
async def test_a_broken_file_is_named(engine, pool, name, content, words):
    (pool / name).unlink()
    if content is not None:
        (pool / name).write_bytes(content)
    with pytest.raises(ConfigError if words else Unavailable, match=words):
        await answer(engine)


POOLS = os.environ.get("COLLEGIUM_POOLS")


@pytest.mark.skipif(not POOLS, reason="COLLEGIUM_POOLS names no folder of recorded pools")
async def test_a_real_pool_is_replayed_question_by_question():
    folder = Path(POOLS or "") / "gsm8k-gpt3"
    engine = RecordedEngine(EngineSpec(engine_id="replay", backend="recorded", model=str(folder)))
    expert = ExpertSpec(expert_id="gpt-3-6b-finetuning", engine_id="replay")
    with gzip.open(folder / "questions.jsonl.gz") as file:
        questions = [json.loads(line) for line in file]
    with gzip.open(folder / "responses" / "gpt-3-6b-finetuning.jsonl.gz") as file:
        texts = {row["id"]: row["text"] for row in map(json.loads, file)}
    for question in questions:
        assert (await answer(engine, question["question"], expert)).text == texts[question["id"]]
