"""From a pool on disk to a report, with the static encoder."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from evals.routing.bench import evaluate
from evals.routing.judged import Judging, Texts
from evals.routing.report import as_json, as_markdown
from evals.routing.setting import make_setting
from evals.routing.stacked import Stacking
from evals.routing.votes import ask, take_first
from experts.errors import ConfigError
from experts.pools import read_rows
from experts.types import ExpertSpec, Request
from orchestrator.cli import app
from routers.base import RouterParts
from routers.learned import MODELS, artefact
from routers.learned.router import linear
from routers.questions import Questions
from routers.records import read_records
from routers.static import WordLlama
from tests.conftest import write_rows
from tests.orchestrator.served import serving

RESULT_KEYS = {
    "router",
    "aggregator",
    "top_k",
    "score",
    "ci95",
    "mean_calls",
    "oracle_gap_closed",
    "usd_per_1k",
    "fit_s",
    "route_ms_p50",
    "route_ms_p99",
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(cache):
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words])


async def setting_of(folder, cache, **options):
    return await make_setting(read_records(folder), WordLlama(), cache, train="train", test="test", seed=0, **options)


async def evaluated(folder, cache, routers, **options):
    options = {"top_ks": [1], "aggregator": "weighted_vote", **options}
    evaluation = await evaluate(await setting_of(folder, cache), routers, **options)
    return evaluation, as_json(evaluation, np.array([1.0, 2.0]))


def without_times(report):
    results = [{k: v for k, v in r.items() if "_ms" not in k and k != "fit_s"} for r in report["results"]]
    return {**report, "results": results}


async def test_a_router_that_knows_the_skills_helps_and_says_so(make_pool, cache):
    _, report = await evaluated(make_pool(questions=400), cache, ["linear"])
    (result,) = report["results"]
    best = report["baselines"]["best_single"]
    assert set(result) >= RESULT_KEYS
    assert result["score"] > best["score"] + 0.2
    assert result["verdict"] == "helps"
    assert result["oracle_gap_closed"] > 0.5
    assert result["difference"]["value"] == pytest.approx(result["score"] - best["score"])
    assert result["difference"]["ci95"][0] > 0
    assert {"best_single", "best_single_hindsight", "task_best", "random", "majority_vote", "oracle"} <= set(
        report["baselines"]
    )
    assert report["baselines"]["oracle"]["score"] >= max(b["score"] for b in report["baselines"].values())


async def test_a_router_without_anything_to_learn_does_not_help(make_pool, cache):
    _, report = await evaluated(make_pool(questions=400, skilled=0.5, other=0.5), cache, ["linear", "task"])
    assert [r["verdict"] for r in report["results"]] == ["does not help"] * 2
    assert "does not help" in as_markdown(report)


async def test_the_same_seed_gives_the_same_report(make_pool, cache):
    folder = make_pool(questions=120)
    routers = ["linear", "cluster", "choice", "panel"]
    first, second = [(await evaluated(folder, cache, routers, top_ks=[1, 3]))[1] for _ in range(2)]
    assert without_times(first) == without_times(second)


async def test_test_answers_are_not_learned_from(make_pool, cache):
    """Swap the answers of the test split: predictions stay what they were."""
    setting = await setting_of(make_pool(questions=120), cache)
    before = (await evaluate(setting, ["linear"], top_ks=[1], aggregator="vote")).fits[0].predicted
    setting.records.scores_QE[setting.test] = 1 - setting.records.scores_QE[setting.test]
    after = (await evaluate(setting, ["linear"], top_ks=[1], aggregator="vote")).fits[0].predicted
    assert (before == after).all()


async def test_several_calls_vote_with_the_services_own_aggregator(make_pool, cache):
    evaluation, report = await evaluated(make_pool(questions=400), cache, ["linear"], top_ks=[1, 4], aggregator="vote")
    one, four = report["results"]
    assert one["mean_calls"] == 1.0
    assert 3.0 <= four["mean_calls"] < 4.0, "three that agree leave the fourth nothing to decide"
    assert four["aggregator"] == "vote"
    # The same four voters; only ties fall otherwise, to the expert that the router trusts most.
    assert four["score"] >= report["baselines"]["majority_vote"]["score"]
    assert len(evaluation.fits) == 1


async def test_a_vote_elects_the_answer_that_most_give(make_pool, cache):
    from evals.routing.votes import aggregator_for

    setting = await setting_of(make_pool(questions=40), cache)
    records, question = setting.records, int(setting.test[0])
    records.answers_QE[question] = [0, 1, 1, -1]
    records.scores_QE[question] = [0, 1, 1, 0]
    predicted = np.tile([0.9, 0.2, 0.1, 0.0], (len(setting.test), 1))
    vote = await ask(predicted, setting, aggregator_for("vote", setting), 3)
    weighted = await ask(predicted, setting, aggregator_for("weighted_vote", setting), 3)
    assert (vote.scores[0], weighted.scores[0]) == (1.0, 0.0)


async def test_a_cascade_stops_where_recorded_answers_agree(make_pool, cache):
    """They are what was parsed already: nothing is to be found in them by the question's form."""
    from evals.routing.votes import aggregator_for

    setting = await setting_of(make_pool(questions=40), cache)
    texts = ("none of these", *setting.records.answer_texts[1:])
    setting = replace(setting, records=replace(setting.records, answer_texts=texts))
    setting.records.answers_QE[:] = 0
    predicted = np.tile([0.9, 0.2, 0.1, 0.0], (len(setting.test), 1))
    assert (await ask(predicted, setting, aggregator_for("cascade", setting), 4)).calls.max() == 2
    setting.records.answers_QE[:] = -1
    with pytest.raises(ConfigError, match="has scores only"):
        aggregator_for("cascade", setting)


async def test_votes_need_parsed_answers(make_pool, cache):
    setting = await setting_of(make_pool(questions=40), cache)
    setting.records.answers_QE[:] = -1
    with pytest.raises(ConfigError, match=r"Pool .toy. has scores only: in responses"):
        await evaluate(setting, ["linear"], top_ks=[3], aggregator="vote")
    one = await evaluate(setting, ["linear"], top_ks=[1], aggregator="vote")
    assert "majority_vote" not in one.baselines


def test_the_command_writes_a_report_and_plots(run, make_pool, tmp_path):
    out = tmp_path / "out"
    found = run(
        "eval", "routing", "--pool", make_pool(questions=120), "--router", "task,linear", "--encoder", "wordllama",
        "--top-k", "1,3", "--out", out,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    report = json.loads((out / "report.json").read_text())
    assert [(r["router"], r["top_k"]) for r in report["results"]] == [
        ("task", 1),
        ("task", 3),
        ("linear", 1),
        ("linear", 3),
    ]
    assert "best_single" in (out / "report.md").read_text()
    for name in ("scores", "cost", "pair", "reliability"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--router", "nonsense"], 1, "No learned router 'nonsense'"),
        (["--test", "val"], 1, "split 'val' is empty"),
        (["--experts", "law-expert,nobody"], 1, "no expert 'nobody'"),
        (["--top-k", "many"], 2, "--top-k"),
        (["--stack-calls", "2"], 2, "--stack-calls"),
        (["--aggregator", "stack", "--stack-calls", "2"], 2, "combines answers"),
        (["--aggregator", "vote", "--top-k", "3", "--max-calls", "1"], 2, "combines answers"),
        (["--aggregator", "fuse", "--top-k", "2"], 1, "asks an expert itself"),
        (["--aggregator", "best_of", "--top-k", "2"], 1, "has no 'text' in responses/"),
        (["--artefact", "reward", "--top-k", "2"], 2, "only '--aggregator best_of' heeds it"),
        (["--router", ","], 1, "names no router"),
        (["--experts", ","], 1, "at least one: none given"),
        (["--train", "test"], 1, "to be learned from and tested on"),
        (["--seed", "-1"], 2, "--seed"),
    ],
)
def test_mistakes_are_named(run, make_pool, tmp_path, words, code, message):
    found = run(
        "eval", "routing", "--pool", make_pool(questions=40), "--encoder", "wordllama", "--out", tmp_path / "o", *words
    )
    assert found.exit_code == code
    assert message in found.output
    assert not (tmp_path / "o").exists()


def test_a_router_fitted_by_the_command_routes_in_a_service(run_fit, make_pool):
    folder = run_fit("linear", make_pool(questions=240))
    specs = [ExpertSpec(expert_id=e, engine_id="x") for e in ("mine", "law-expert", "new")]
    experts = {s.expert_id: type("Expert", (), {"spec": s})() for s in specs}
    parts = RouterParts(encoder=lambda: WordLlama(), experts=experts, artefact=folder)
    router = linear(parts, names={"mine": "cells-expert"})
    requests = [Request(prompt="the membrane of a living cell number 7"), Request(prompt="the court and the contract")]
    first, second = asyncio.run(router.route(requests, specs))
    assert (first.expert_ids, second.expert_ids) == (("mine",), ("law-expert",))
    assert first.scores["new"] == min(first.scores.values())
    assert "fitted on 120 questions of toy" in first.reason


@pytest.fixture
def run_fit(run, tmp_path):
    def fit(name, pool):
        found = run("router", "fit", name, "--pool", pool, "--out", tmp_path / name, "--encoder", "wordllama")
        assert found.exit_code == 0, found.output
        return tmp_path / name

    return fit


def test_show_prints_what_a_router_is(run, run_fit, make_pool):
    found = run("router", "show", run_fit("factor", make_pool(questions=120)))
    assert found.exit_code == 0, found.output
    assert "60 questions of toy" in found.output
    assert "wordllama, 256 wide" in found.output
    assert "prices-expert" in found.output


def test_show_says_whom_a_router_by_task_would_ask(run, run_fit, make_pool):
    """Not one task's scores in the name of all: a question about nothing would be given some task."""
    pool = make_pool(questions=120, other=0.1)
    scores = read_records(pool).scores_QE[:60]
    found = run("router", "show", run_fit("task", pool))
    assert found.exit_code == 0, found.output
    assert f"{scores[:, 0].mean():.3f}  algebra-expert" in found.output
    assert "law: law-expert " in found.output
    assert "nothing in particular" not in found.output


def test_an_expert_joins_a_fitted_router(run, make_pool, tmp_path):
    pool = make_pool(questions=400, other=0.1)
    others = "law-expert,cells-expert,prices-expert"
    found = run("router", "fit", "linear", "--pool", pool, "--out", tmp_path / "three", "--encoder", "wordllama",
                "--experts", others)  # fmt: skip
    assert found.exit_code == 0, found.output
    head = json.loads((pool / "pool.json").read_text())
    (new,) = {e["expert_id"] for e in head["experts"]} - set(others.split(","))
    words = ["router", "join", tmp_path / "three", "--expert", new, "--out", tmp_path / "four"]
    assert run(*words, "--pool", pool).exit_code == 0
    fitted, before = artefact.load(tmp_path / "four"), artefact.load(tmp_path / "three")
    assert fitted.expert_ids == (*before.expert_ids, new)
    about = Questions(vectors_QW=np.eye(1, 256, dtype=np.float32), tasks=("law",))
    np.testing.assert_array_equal(fitted.model.predict(about)[:, :3], before.model.predict(about))
    for rest, message in (([], "neither"), (["--pool", pool, "--expert", "law-expert"], "already")):
        found = run(*words, *rest)
        assert found.exit_code == 1
        assert message in found.output
    assert (
        run(
            *words[:2], tmp_path / "four", "--expert", "second", "--card", "a lawyer", "--out", tmp_path / "five"
        ).exit_code
        == 0
    )
    assert artefact.load(tmp_path / "five").model.predict(about).shape == (1, 5)


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_fitted(run, make_pool, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("evals.routing.bench._fit", lambda *_: pytest.fail("a fit may take minutes"))
    found = run(
        "eval", "routing", "--pool", make_pool(questions=40), "--router", "task", "--encoder", "wordllama",
        "--out", tmp_path / "file" / "report",
    )  # fmt: skip
    assert found.exit_code == 1
    assert "Choose another --out" in " ".join(found.output.split())


def test_each_router_once_and_no_more_calls_than_experts(run, make_pool, tmp_path):
    found = run(
        "eval", "routing", "--pool", make_pool(questions=40), "--router", "task, task", "--encoder", "wordllama",
        "--top-k", "4,9", "--out", tmp_path,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert (result["router"], result["top_k"]) == ("task", 4)


@pytest.mark.parametrize("router", MODELS)
def test_a_few_questions_are_too_few_or_enough(make_pool, cache, router):
    """Never a matrix that cannot be solved."""

    async def fit(count):
        folder = make_pool(questions=40, name=f"pool{count}")
        head = json.loads((folder / "pool.json").read_text())
        head["splits"]["train"] = [f"q{i}" for i in range(count)]
        (folder / "pool.json").write_text(json.dumps(head))
        await evaluate(await setting_of(folder, cache), [router], top_ks=[1], aggregator="vote")

    with pytest.raises(ConfigError, match="7 questions are too few to learn from"):
        asyncio.run(fit(7))
    asyncio.run(fit(8))


async def test_the_stack_needs_parsed_answers(make_pool, cache):
    folder = make_pool(questions=40)
    setting = await setting_of(folder, cache)
    setting.records.answers_QE[:] = -1
    with pytest.raises(ConfigError, match=r"Pool .toy. has scores only"):
        Stacking.fit(folder, setting)


async def test_tasks_can_be_hidden_from_routers_but_not_from_the_baseline(make_pool, cache):
    folder = make_pool(questions=400)
    hidden = await setting_of(folder, cache, hide_tasks=True)
    assert set(hidden.asked.tasks) == {None}
    assert None not in hidden.training.questions.tasks
    report = as_json(await evaluate(hidden, ["task"], top_ks=[1], aggregator="vote"), np.array([1.0]))
    told = as_json(await evaluate(await setting_of(folder, cache), ["task"], top_ks=[1], aggregator="vote"), np.ones(1))
    assert report["baselines"] == told["baselines"]
    assert "not told" in as_markdown(report)
    assert "not told" not in as_markdown(told)
    assert report["results"][0]["score"] > report["baselines"]["best_single"]["score"] + 0.2, "texts show the task"


def test_a_pool_is_embedded_once(run_fit, make_pool, cache, monkeypatch):
    pool = make_pool(questions=40)
    run_fit("task", pool)
    monkeypatch.setattr(WordLlama, "encode", lambda *_: pytest.fail("these texts are in the cache"))
    run_fit("knn", pool)


def test_a_service_with_a_fitted_router(run, run_fit, make_pool, tmp_path):
    folder = run_fit("stack", make_pool(questions=120))
    config = tmp_path / "collegium.yaml"
    config.write_text(
        "encoder: {model: wordllama}\n"
        "engines: {e: {backend: fake}}\n"
        "experts: {law-expert: {engine: e}, cells-expert: {engine: e}}\n"
        f"policies: {{default: {{router: {{name: stack, artefact: {folder}}}}}}}\n"
    )
    found = run("route", "the membrane of a living cell", "-c", config, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["expert_ids"] == ["cells-expert"]


def test_a_service_decides_as_the_benchmark_did(run_fit, make_pool):
    """The same text and task over HTTP: the same scores, bit for bit up to the wire's digits."""
    pool = make_pool(questions=120)
    records, folder = read_records(pool), run_fit("task", pool)
    asked = Questions(vectors_QW=np.zeros((120, 256), np.float32), tasks=records.tasks).take(records.rows("test")[:8])
    offline = artefact.load(folder).model.predict(asked)
    config = {
        "encoder": {"model": "wordllama"},
        "engines": {"e": {"backend": "fake"}},
        "experts": {e: {"engine": "e"} for e in records.expert_ids},
        "policies": {"default": {"router": {"name": "task", "artefact": str(folder)}}},
    }
    with serving(config) as served:
        for row, question in enumerate(records.rows("test")[:8]):
            body = {
                "messages": [{"role": "user", "content": records.texts[question]}],
                "metadata": {"task": records.tasks[question]},
            }
            found = served.http.post("/v1/route", json=body).json()["decision"]
            scores = found["scores"]
            assert [scores[e] for e in records.expert_ids] == pytest.approx(offline[row])
            assert found["expert_ids"] == [records.expert_ids[offline[row].argmax()]]


async def stacking_of(folder, cache, **options):
    setting = await setting_of(folder, cache, **options)
    return setting, Stacking.fit(folder, setting)


async def test_the_stack_hears_the_routers_experts_and_nobody_else(make_pool, cache):
    setting, stacking = await stacking_of(make_pool(questions=240, other=0.1), cache)
    predicted = np.tile([0.9, 0.8, 0.2, 0.1], (len(setting.test), 1))
    one, two = [await stacking.ask(predicted, k) for k in (1, 2)]
    assert (one.scores == take_first(predicted, setting).scores).all()
    assert (one.costs == take_first(predicted, setting).costs).all()
    assert 1 < two.calls.mean() <= 2
    assert (await replace(stacking, calls=1.0).ask(predicted, 2)).calls.mean() == 1
    assert ((two.scores == setting.scores_QE[:, 0]) | (two.scores == setting.scores_QE[:, 1])).all()
    assert two.scores.mean() > one.scores.mean() + 0.05, "two experts know two skills, and it knows which"
    stacking.ballots.votes_QE[:, 2:] = 0
    assert ((await stacking.ask(predicted, 2)).scores == two.scores).all()


class Longest:
    """Likes long answers, which are the right ones here."""

    name, takes_one = "longest", False

    async def settled(self, request, decision, completions, pending):
        return not pending

    async def aggregate(self, request, decision, completions):
        assert "A. a\nB. b\nC. c\nD. d" in request.question, "as 'collegium eval run' asks"
        return max(completions, key=lambda c: len(c.text))


@pytest.fixture
def texts_pool(make_pool):
    """Right answers are longer."""
    folder = make_pool(questions=240)
    for path in (folder / "responses").iterdir():
        rows = [row for _, row in read_rows(path)]
        texts = [f"{'So it is. ' * int(10 * row['score'])}The answer is {row['answer']}." for row in rows]
        write_rows(path, [{**row, "text": text} for row, text in zip(rows, texts, strict=True)])
    return folder


async def test_best_of_reads_the_recorded_texts(texts_pool, cache):
    setting = await setting_of(texts_pool, cache)
    predicted = np.tile([0.9, 0.1, 0.8, 0.2], (len(setting.test), 1))
    judging = Judging(aggregator=Longest(), texts=Texts.read(texts_pool, setting))
    outcome = await judging.ask(predicted, 2)
    assert (outcome.scores == setting.scores_QE[:, [0, 2]].max(axis=1)).all()
    assert (outcome.calls == 2).all()


def test_best_of_on_the_command_line(texts_pool, run, tmp_path):
    words = ["--encoder", "wordllama", "--router", "task", "--top-k", "2", "--aggregator", "best_of"]
    found = run("eval", "routing", "--pool", texts_pool, "--out", tmp_path / "o", *words)
    assert found.exit_code == 0, found.output
    (result,) = json.loads((tmp_path / "o" / "report.json").read_text())["results"]
    assert (result["aggregator"], result["mean_calls"]) == ("best_of", 2)


async def test_the_stack_learns_from_train_alone(make_pool, cache):
    """Other answers to the test split leave it as it was; a task that is hidden from routers is hidden from it."""
    folder = make_pool(questions=240, other=0.1)
    setting, stacking = await stacking_of(folder, cache)
    setting.records.scores_QE[setting.test] = 0
    again = Stacking.fit(folder, setting)
    assert (again.stack.logit.worth_E == stacking.stack.logit.worth_E).all()
    assert stacking.ballots.tasks_Q.min() >= 0
    _, hidden = await stacking_of(folder, cache, hide_tasks=True)
    assert (hidden.ballots.tasks_Q == -1).all()


def test_the_command_takes_the_stack_and_fits_it(run, make_pool, tmp_path):
    out = tmp_path / "out"
    found = run(
        "eval", "routing", "--pool", make_pool(questions=240, other=0.1), "--router", "task", "--encoder", "wordllama",
        "--top-k", "1,3", "--aggregator", "stack", "--stack-calls", "1.5", "--out", out,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    one, three = json.loads((out / "report.json").read_text())["results"]
    assert (one["aggregator"], three["aggregator"]) == ("first", "stack")
    assert 1 <= three["mean_calls"] <= 3
    assert "stack, top 3" in (out / "report.md").read_text()
