"""Mixture of prompts: its card's tests, with a model that does what a rule in the instruction says."""

import asyncio
import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from experts.errors import ConfigError
from experts.types import ExpertSpec, Message, Request
from orchestrator.cli import app
from orchestrator.commands.prompts import read_pairs
from routers.base import RouterParts
from routers.prompt_search import outside, queries_of, search_prompts
from routers.prompts import Prompts, Regions
from routers.regions import Region, choose_k, nearest_region, split_regions

RULES = {"reverse": lambda x: x[::-1], "upper": str.upper, "count": lambda x: str(len(x))}
WORDS = {"reverse": "abcdef", "upper": "ghijkl", "count": "mnopqr"}


def pairs_of(each, seed):
    """Three tasks whose words share no letter; a third of the pairs each."""
    rng = np.random.default_rng(seed)
    pairs = []
    for name, letters in WORDS.items():
        for _ in range(each):
            word = "".join(rng.choice(list(letters), int(rng.integers(3, 7))))
            pairs.append((word, RULES[name](word)))
    return pairs


MEANING = 0.3 * np.eye(18) + np.kron(np.eye(3), np.ones((6, 6)))
"""Letters of one task are near to each other."""


def embed(texts):
    rows = np.array([[t.count(chr(97 + c)) for c in range(18)] for t in texts], np.float32)
    rows = (rows @ MEANING).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


async def propose(pairs, number):
    """The rule that explains most of the pairs."""
    return max(RULES, key=lambda name: sum(RULES[name](x) == y for x, y in pairs))


def answer(instruction, demos, question):
    """The rule, if the demonstrations nearest to the question follow it; else a copy of the nearest's answer."""
    if not demos:
        return RULES[instruction](question) if instruction in RULES else question
    nearest = max(demos, key=lambda d: float(embed([d[0]])[0] @ embed([question])[0]))
    follows = instruction in RULES and RULES[instruction](nearest[0]) == nearest[1]
    return RULES[instruction](question) if follows else nearest[1]


async def grade(instruction, demos, query):
    return float(answer(instruction, demos, query[0]) == query[1])


async def found_on(demos, validation, regions=None):
    centroids, split = split_regions(embed([q for q, _ in demos]), 0, regions=regions)
    vectors = embed([q for q, _ in validation])
    experts = await search_prompts(demos, split, centroids, validation, vectors, propose=propose, grade=grade)
    return centroids, experts


def accuracy(centroids, experts, test):
    nearest = nearest_region(embed([q for q, _ in test]), centroids).argmin(axis=1)
    said = [answer(experts[k].instruction, experts[k].demos, q) for k, (q, _) in zip(nearest, test, strict=True)]
    return np.mean([s == gold for s, (_, gold) in zip(said, test, strict=True)])


async def test_a_prompt_for_each_task_beats_one_prompt_for_all():
    demos, validation, test = pairs_of(30, 0), pairs_of(15, 1), pairs_of(40, 2)
    centroids, experts = await found_on(demos, validation)
    assert len(experts) == 3
    assert {e.instruction for e in experts} == set(RULES)
    assert accuracy(centroids, experts, test) > 0.97
    one_centre, one = await found_on(demos, validation, regions=1)
    assert len(one) == 1
    assert 0.25 < accuracy(one_centre, one, test) < 0.6
    # The instruction that is best over all questions, in every region's prompt.
    overall = [e.__class__(instruction=one[0].instruction, demos=e.demos, validated=0, queries=0) for e in experts]
    assert accuracy(centroids, overall, test) < 0.7


def test_three_blobs_are_three_and_one_is_one():
    rng = np.random.default_rng(0)
    blobs = np.concatenate([rng.normal(c * 3, 0.3, (40, 16)) for c in np.eye(3, 16)])
    assert choose_k(blobs, 0) == 3
    for width in (2, 64):
        assert choose_k(rng.normal(size=(120, width)), 0) == 1, "the paper's rule finds several here"
    assert choose_k(np.ones((9, 4)), 0) == 1
    assert choose_k(np.ones((1, 4)), 0) == 1


def test_capacity_trims_the_large_and_fills_the_small():
    rng = np.random.default_rng(0)
    blobs = np.concatenate([rng.normal(c * 9, 0.1, (n, 8)) for c, n in zip(np.eye(3, 8), (20, 5, 5), strict=True)])
    _, regions = split_regions(blobs, 0, regions=3)
    by_size = sorted(regions, key=lambda r: -len(r.members))
    assert [len(r.kept) for r in by_size] == [10, 10, 10]
    assert [len(set(r.kept)) for r in by_size] == [10, 5, 5]
    assert [len(r.trimmed) for r in by_size] == [10, 0, 0]
    assert set(by_size[0].kept) | set(by_size[0].trimmed) == set(by_size[0].members)


def test_candidates_never_come_from_what_the_prompt_shows():
    rng = np.random.default_rng(0)
    blobs = np.concatenate([rng.normal(c * 9, 0.1, (n, 8)) for c, n in zip(np.eye(3, 8), (20, 5, 5), strict=True)])
    _, regions = split_regions(blobs, 0, regions=3)
    for region in regions:
        assert not set(outside(region, regions)) & set(region.kept)
        assert set(region.trimmed) <= set(outside(region, regions))
    (whole,) = split_regions(blobs, 0, regions=1)[1]
    assert outside(whole, [whole]) == list(range(30)), "one region is plain APE with demonstrations"


def test_a_region_of_one_is_a_region():
    vectors = np.array([[0.0, 0], [0, 0.1], [0.1, 0], [9, 9]])
    _, regions = split_regions(vectors, 0, regions=2)
    assert sorted(len(r.members) for r in regions) == [1, 3]
    assert all(len(r.kept) == 2 for r in regions)


def test_too_many_regions_are_refused():
    with pytest.raises(ConfigError, match="different demonstrations"):
        split_regions(np.ones((5, 3)), 0, regions=2)


def test_validation_is_the_regions_own_then_the_nearest():
    distances = np.array([[0.1, 0.9], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.9, 0.2]])
    assert queries_of(distances, 0, budget=3) == [0, 2, 3]
    assert queries_of(distances, 1, budget=1) == [1, 4, 3], "all of the region's own"


async def test_where_every_candidate_scores_nothing_one_is_still_chosen():
    async def hopeless(instruction, demos, query):
        return 0.0

    demos = pairs_of(4, 0)
    regions = [Region(members=tuple(range(12)), kept=tuple(range(12)), trimmed=())]
    (expert,) = await search_prompts(
        demos, regions, np.zeros((1, 18)), demos[:2], embed([q for q, _ in demos[:2]]), propose=propose, grade=hopeless
    )
    assert expert.instruction in RULES
    assert expert.validated == 0


class Letters:
    name, width = "letters", 18

    async def encode(self, texts):
        return embed(texts)


def saved(folder, width=18):
    centroids = embed(["aaa", "ggg"])[:, :width]
    regions = Regions(expert_ids=("x-1", "x-2"), centroids_KW=centroids, encoder="letters", demos_digest="0")
    regions.save(folder, {})
    return folder


def made(folder, ids=("x-1", "x-2", "other"), **options):
    experts = {e: type("E", (), {"spec": ExpertSpec(expert_id=e, engine_id="x")})() for e in ids}
    return Prompts(RouterParts(encoder=Letters, experts=experts, artefact=folder), **options), [
        e.spec for e in experts.values()
    ]


def ask(text):
    return Request(messages=(Message(role="user", content=text),))


async def test_the_nearest_regions_prompt_answers(tmp_path):
    router, pool = made(saved(tmp_path))
    decisions = await router.route([ask("aaa"), ask("ggg")], pool)
    assert [d.expert_ids[0] for d in decisions] == ["x-1", "x-2"]
    assert decisions[0].ranked() == ["x-1", "x-2", "other"]
    assert "0.00 away" in decisions[0].reason
    alone = await router.route([ask("aaa")], pool[2:])
    assert alone[0].expert_ids == ("other",)


async def test_a_question_far_from_every_region_may_be_left_to_another(tmp_path):
    router, pool = made(saved(tmp_path), far=1.0, otherwise="other")
    near, far = await router.route([ask("aab"), ask("zqr")], pool)
    assert near.expert_ids == ("x-1",)
    assert far.expert_ids == ("other",)
    assert "further than 1" in far.reason


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs an artefact"):
        made(None)
    with pytest.raises(ConfigError, match="No prompt experts"):
        made(tmp_path / "nothing")
    folder = saved(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"no expert \['x-2'\]"):
        made(folder, ids=("x-1",))
    with pytest.raises(ConfigError, match="go together"):
        made(folder, far=1.0)
    with pytest.raises(ConfigError, match="encoder is 'letters'"):
        made(saved(tmp_path / "b", width=7))
    head = json.loads((folder / "prompts.json").read_text())
    (folder / "prompts.json").write_text(json.dumps({**head, "version": 9}))
    with pytest.raises(ConfigError, match="of version 9"):
        made(folder)
    (folder / "prompts.json").write_text(json.dumps({**head, "expert_ids": ["x-1"]}))
    with pytest.raises(ConfigError, match="1 experts for 2 regions"):
        made(folder)


@pytest.mark.parametrize("line", ["{", '{"question": "x"}', '{"question": "", "answer": "y"}', "[1]"])
def test_a_bad_demonstration_is_named(line, tmp_path):
    path = tmp_path / "demos.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"demos\.jsonl, row 3"):
        read_pairs(path)


CONFIG = """
engines: {e: {backend: fake, options: {text: "{question}"}}}
experts: {x: {engine: e, tags: [chat], defaults: {max_tokens: 9}}}
policies: {default: {}}
encoder: {model: wordllama}
"""


def test_from_demonstrations_to_a_service_that_uses_them(tmp_path, monkeypatch):
    """The scripted engine repeats the question; so instructions are nonsense, and all else is as it will be."""
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "collegium.yaml").write_text(CONFIG)
    rows = [{"question": f"{w} number {i}", "answer": w} for i in range(20) for w in ("apple pie", "contract law")]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "prompts"
    words = ["router", "prompts", "--demos", tmp_path / "demos.jsonl", "--expert", "x", "--out", out, "--regions", "2"]
    config = ["-c", tmp_path / "collegium.yaml"]
    result = CliRunner().invoke(app, [str(w) for w in (*words, *config)])
    assert result.exit_code == 0, result.output
    made_ = yaml.safe_load((out / "experts.yaml").read_text())["experts"]
    assert set(made_) == {"x-1", "x-2"}
    assert all(e["engine"] == "e" and 0 < len(e["demos"]) <= 8 for e in made_.values())
    served = yaml.safe_load(CONFIG)
    served["experts"] |= made_
    served["policies"]["default"] = {"router": {"name": "prompts", "artefact": str(out)}}
    (tmp_path / "served.yaml").write_text(yaml.safe_dump(served))
    chosen = {
        json.loads(CliRunner().invoke(app, ["route", text, "--json", "-c", str(tmp_path / "served.yaml")]).stdout)[
            "expert_ids"
        ][0]
        for text in ("apple pie number 99", "contract law number 99")
    }
    assert chosen == {"x-1", "x-2"}


def test_demonstrations_are_not_validated_on(tmp_path, monkeypatch):
    (tmp_path / "collegium.yaml").write_text(CONFIG)
    (tmp_path / "demos.jsonl").write_text("".join(f'{{"question": "q{i}", "answer": "a"}}\n' for i in range(20)))
    words = [
        "router",
        "prompts",
        "--demos",
        "demos.jsonl",
        "--validation",
        "demos.jsonl",
        "--expert",
        "x",
        "--out",
        "o",
    ]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "validation questions too" in result.output


def test_asyncio_is_all_it_needs():
    assert asyncio.run(propose([("abc", "cba")], 0)) == "reverse"
