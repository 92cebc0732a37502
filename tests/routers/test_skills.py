"""The skill router from keywords to decisions, on made-up experts whose skills are known."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from experts.base import EngineExpert
from experts.errors import ConfigError
from experts.fake import FakeEngine
from experts.types import EngineSpec, ExpertSpec, Message, Request
from orchestrator.cli import app
from orchestrator.commands.keywords import read_keywords
from routers.base import RouterParts
from routers.learned import artefact
from routers.learned.artefact import Fitted
from routers.learned.base import Training
from routers.learned.skills import RELEASED
from routers.learned.skills import Skills as Model
from routers.profiles import Profiles
from routers.questions import Questions
from routers.skills import Skills
from routers.vocabulary import mine

SKILLS = ("algebra", "contract law", "cell biology", "pricing")
EXPERTS = ("a-algebra", "b-law", "c-cells", "d-prices")


class Letters:
    """Character trigrams, hashed: texts with the same words are near."""

    name, width = "letters", 64

    async def encode(self, texts):
        return np.stack([self.embed(t) for t in texts]) if len(texts) else np.empty((0, self.width), np.float32)

    def embed(self, text):
        vector = np.zeros(self.width, np.float32)
        padded = f"  {text.lower()}  "
        for i in range(len(padded) - 2):
            vector[int.from_bytes(padded[i : i + 3].encode()[:4], "little") % 61] += 1
        return vector / np.linalg.norm(vector)


def world(size, *, seed=0, shuffled=False):
    """The card's synthetic pool: 0.9 on the own skill, 0.3 elsewhere."""
    rng = np.random.default_rng(seed)
    skill = np.arange(size) % 4
    right = rng.random((size, 4)) < np.where(np.arange(4) == skill[:, None], 0.9, 0.3)
    texts = tuple(f"a question of {SKILLS[s]}" for s in (rng.permutation(skill) if shuffled else skill))
    encoder = Letters()
    return skill, Training(
        questions=Questions(vectors_QW=np.stack([encoder.embed(t) for t in texts]), tasks=(None,) * size, texts=texts),
        scores_QE=right.astype(np.float32),
        answers_QE=np.zeros((size, 4), np.int32),
        costs_E=np.ones(4),
        expert_ids=EXPERTS,
    )


def keywords_of(skill):
    return [[SKILLS[s]] for s in skill]


def saved(folder, rule=RELEASED):
    skill, training = world(200)
    model = Model.from_keywords(training, keywords_of(skill), rule)
    fitted = Fitted(
        name="skills", model=model, expert_ids=EXPERTS, pool="toy", pool_digest="0" * 64,
        encoder="letters", width=64, questions=200, seed=0,
    )  # fmt: skip
    artefact.save(fitted, folder)
    return folder


def experts_of(*ids, text="Keywords: algebra, geometry", fail=("ok",)):
    engine = FakeEngine(EngineSpec(engine_id="x", backend="fake", model="fake", options={"text": text, "fail": fail}))
    return {e: EngineExpert(ExpertSpec(expert_id=e, engine_id="x"), engine) for e in ids}


def made(folder, ids=EXPERTS, *, text="Keywords: algebra, geometry", fail=("ok",), **options):
    parts = RouterParts(encoder=Letters, experts=experts_of(*ids, text=text, fail=fail), artefact=folder)
    return Skills(parts, **options), [e.spec for e in parts.experts.values()]


def ask(text, **metadata):
    return Request(messages=(Message(role="user", content=text),), metadata=metadata)


async def test_the_cards_pool_the_specialist_is_recruited(tmp_path):
    router, pool = made(saved(tmp_path), draw="with")
    skill, _ = world(400, seed=1)
    decisions = await router.route([ask(f"a question of {SKILLS[s]}", route_seed=i) for i, s in enumerate(skill)], pool)
    slots = [e == EXPERTS[s] for d, s in zip(decisions, skill, strict=True) for e in d.draws[:3]]
    assert np.mean(slots) > 0.75


def test_the_gain_is_gone_when_skills_are_shuffled():
    skill, training = world(200)
    model = Model.from_keywords(training, keywords_of(skill), RELEASED)
    _, told = world(400, seed=1)
    _, mixed = world(400, seed=1, shuffled=True)
    right, wrong = (
        t.scores_QE[np.arange(400), model.predict(t.questions).argmax(axis=1)].mean() for t in (told, mixed)
    )
    best_single = told.scores_QE.mean(axis=0).max()
    assert right > best_single + 0.3
    assert wrong < best_single + 0.08


def test_a_profile_counts_right_and_wrong():
    scores = np.array([[1, 0], [1, 0], [0, 0.5]])
    profiles = Profiles.build([["alg"], ["alg", "geo"], ["alg", "alg"]], scores, ["one", "two"])
    assert profiles.seen == {"alg": 3, "geo": 1}
    assert profiles.scores == {"one": {"alg": 1, "geo": 1}, "two": {"alg": -2, "geo": -1}}
    np.testing.assert_allclose(profiles.accuracy_KE, [[2 / 3, 1 / 6], [1, 0]])


def test_smoothing_tells_one_of_one_from_ten_of_ten():
    profiles = Profiles(seen={"rare": 1, "often": 10}, scores={"x": {"rare": 1, "often": 10}})
    local, _ = profiles.scored("laplace", 0)
    np.testing.assert_allclose(local[:, 0], [2 / 3, 11 / 12])
    shrunk, mean = profiles.scored("shrunk", 10.0)
    assert mean.tolist() == [1]
    assert shrunk.max() <= 1


def test_an_answer_that_could_not_be_read_counts_as_wrong():
    """Its score is 0 in the records: the profile falls by one."""
    assert Profiles.build([["alg"]], np.zeros((1, 1)), ["one"]).scores["one"]["alg"] == -1


async def test_decisions_carry_every_candidate_and_draws_that_any_k_can_use(tmp_path):
    router, pool = made(saved(tmp_path), draw="with", seed=3)
    (decision,) = await router.route([ask("a question of pricing")], pool)
    assert set(decision.scores) == set(EXPERTS)
    assert sum(decision.scores.values()) == pytest.approx(1)
    three = decision.top(3)
    assert sum(three.weights) == pytest.approx(1)
    assert len(three.expert_ids) == len(set(three.expert_ids)) <= 3
    for expert, weight in zip(three.expert_ids, three.weights, strict=True):
        assert weight == pytest.approx(decision.draws[:3].count(expert) / 3)
    assert decision.top(1).expert_ids == decision.draws[:1]


async def test_an_expert_drawn_twice_is_asked_once_and_weighs_twice():
    from routers.base import RouteDecision

    decision = RouteDecision(
        expert_ids=(), weights=(), scores={"a": 0.1, "b": 0.7, "c": 0.2}, reason="", router="r", draws=("b", "a", "b")
    )
    assert decision.top(3).expert_ids == ("b", "a")
    assert decision.top(3).weights == pytest.approx((2 / 3, 1 / 3))
    assert decision.ranked() == ["b", "a", "c"], "who was drawn goes before who was not"


@pytest.mark.parametrize("draw", ["top", "without", "with"])
async def test_the_same_seed_gives_the_same_recruits_in_any_pool_order(draw, tmp_path):
    folder = saved(tmp_path)
    requests = [ask(f"a question of {s}") for s in SKILLS]
    first, pool = made(folder, draw=draw, seed=7)
    second, _ = made(folder, draw=draw, seed=7)
    one = await first.route(requests, pool)
    two = await second.route(requests[::-1], pool[::-1])
    assert [d.top(3).expert_ids for d in one] == [d.top(3).expert_ids for d in two][::-1]


async def test_without_repeats_three_are_three(tmp_path):
    router, pool = made(saved(tmp_path), draw="without")
    decisions = await router.route([ask(f"a question of {SKILLS[i % 4]}", route_seed=i) for i in range(20)], pool)
    assert all(len(d.top(3).expert_ids) == 3 for d in decisions)


async def test_trimming_a_batch_leaves_fewer_experts_to_load(tmp_path):
    folder = saved(tmp_path)
    requests = [ask("a question of algebra", route_seed=i) for i in range(100)]
    loads = []
    for share in (0.0, 0.2):
        router, pool = made(folder, draw="with", trim=share, score="laplace", competence="none")
        loads.append(len({e for d in await router.route(requests, pool) for e in d.top(3).expert_ids}))
    assert loads[1] < loads[0]


async def test_an_expert_may_name_the_keywords(tmp_path):
    router, pool = made(saved(tmp_path), keywords="b-law", text="Keywords: Contract Law., contract laws")
    (decision,) = await router.route([ask("anything")], pool)
    assert decision.expert_ids == ("b-law",)
    assert "contract law" in decision.reason


@pytest.mark.parametrize(
    ("text", "fail"),
    [("I do not know.", ["ok"]), ("Keywords: a keyword that is far too long to be one", ["ok"]), ("x", ["refuse"])],
)
@pytest.mark.parametrize("empty", ["global", "uniform"])
async def test_without_a_keyword_competence_or_the_lot_decides(text, fail, empty, tmp_path):
    router, pool = made(saved(tmp_path), keywords="b-law", text=text, fail=fail, empty=empty, draw="with")
    decisions = await router.route([ask("anything", route_seed=i) for i in range(40)], pool)
    assert all("no keyword" in d.reason for d in decisions)
    drawn = {e for d in decisions for e in d.draws}
    assert drawn == set(EXPERTS) if empty == "uniform" else drawn


async def test_keywords_too_far_from_all_that_is_known_are_dropped(tmp_path):
    router, pool = made(saved(tmp_path), keywords="b-law", text="Keywords: zzzz, qqqq", floor=0.99)
    (decision,) = await router.route([ask("anything")], pool)
    assert "no keyword" in decision.reason


async def test_an_expert_without_a_profile_is_asked_last(tmp_path):
    router, pool = made(saved(tmp_path), ids=("new", *EXPERTS), draw="without")
    decisions = await router.route([ask("a question of pricing", route_seed=i) for i in range(20)], pool)
    assert all(d.ranked()[-1] == "new" and d.scores["new"] == 0 for d in decisions)


async def test_options_change_the_rule_without_a_new_fit(tmp_path):
    folder = saved(tmp_path)
    question = ask("a question of algebra")
    scores = []
    for options in ({}, {"score": "laplace", "competence": "none"}):
        router, pool = made(folder, **options)
        scores.append((await router.route([question], pool))[0].scores["a-algebra"])
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draw": "lots"}, "'draw' is one of top"),
        ({"score": "x"}, "'score' is one of"),
        ({"keywords": "nobody"}, "no expert 'nobody'"),
        ({"trim": 1.0}, "'trim' is a share"),
        ({"recruits": 0}, "'recruits' from 1"),
        ({"temperature": 0.0}, "'temperature' is above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        made(saved(tmp_path), **options)


def test_it_must_be_fitted_and_be_what_it_says(tmp_path):
    with pytest.raises(ConfigError, match="router fit skills"):
        made(None)


def test_phrases_that_set_tasks_apart_are_mined():
    texts = tuple(f"{'solve the quadratic equation' if i % 2 else 'the plaintiff sued'} number {i}" for i in range(80))
    questions = Questions(
        vectors_QW=np.ones((80, 2), np.float32), tasks=tuple(("law", "math")[i % 2] for i in range(80)), texts=texts
    )
    keywords = mine(questions, 0, phrases=8)
    assert keywords[1][0] == "math"
    assert "quadratic equation" in keywords[1]
    assert "plaintiff" in keywords[0]
    assert "number" not in keywords[0] + keywords[1] or keywords[0].index("number") > 0


def test_fit_show_and_the_heat_map(make_pool, tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "skills"
    words = ["router", "fit", "skills", "--pool", make_pool(), "--out", out, "--encoder", "wordllama"]
    assert CliRunner().invoke(app, [str(w) for w in words]).exit_code == 0
    head = json.loads((out / "router.json").read_text())
    assert head["version"] == artefact.FORMAT.version
    assert head["pool_digest"]
    assert head["model"]["profiles"]["scores"]["law-expert"]["law"] > 0
    shown = CliRunner().invoke(app, ["router", "show", str(out)])
    assert shown.exit_code == 0
    assert "keyword" in shown.output
    assert "law-expert" in shown.output
    assert (out / "profiles.png").read_bytes().startswith(b"\x89PNG")


CONFIG = """
engines: {e: {backend: fake, options: {text: "Keywords: civil law, contracts"}}}
experts: {x: {engine: e}}
policies: {default: {}}
"""


def test_an_expert_names_the_keywords_of_a_pool_and_a_profile_is_made_of_them(make_pool, tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "collegium.yaml").write_text(CONFIG)
    pool = str(make_pool(questions=80))
    ask_ = ["router", "keywords", "--pool", pool, "--expert", "x", "--out", "k.jsonl"]
    fit = ["router", "fit", "skills", "--pool", pool, "--out", "s", "--encoder", "wordllama", "--keywords", "k.jsonl"]
    assert CliRunner().invoke(app, [*ask_, "--limit", "10"]).exit_code == 0
    refused = CliRunner().invoke(app, fit)
    assert refused.exit_code == 1
    assert "no keywords for 30 of 40 questions" in refused.output
    assert CliRunner().invoke(app, ask_).exit_code == 0
    assert len((tmp_path / "k.jsonl").read_text().splitlines()) == 40, "nobody is asked about twice"
    assert CliRunner().invoke(app, fit).exit_code == 0
    head = json.loads((tmp_path / "s" / "router.json").read_text())
    assert head["model"]["profiles"]["seen"] == {"civil law": 40, "contracts": 40}


@pytest.mark.parametrize("line", ["{", '{"id": "q1"}', '{"id": "q1", "keywords": "law"}', "[]"])
def test_a_bad_row_of_keywords_is_named(line, tmp_path):
    (tmp_path / "k.jsonl").write_text('{"id": "q0", "keywords": []}\n' + line)
    with pytest.raises(ConfigError, match=r"k\.jsonl, row 2"):
        read_keywords(tmp_path / "k.jsonl")
