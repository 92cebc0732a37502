"""A fitted reward from its folder to its scores, and every folder that must be refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from experts.errors import ConfigError
from experts.types import Completion
from orchestrator.aggregators.base import AggregatorParts
from orchestrator.aggregators.reward_moe import artefact, load_reward
from orchestrator.aggregators.reward_moe.reward import FittedReward
from tests.orchestrator.rewards.conftest import RIGHT, WRONG, Hashed, ask

KINDS = ("armorm", "dmoerm", "single", "uniform")


def answers(*texts):
    return [Completion(request_id="r", expert_id=f"e{i}", text=text) for i, text in enumerate(texts)]


def parts_with(encoder):
    return AggregatorParts(encoder=lambda: encoder, experts={})


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_saved_scores_like_what_was_fitted(kind, make_reward, encoder, tmp_path):
    fitted = await make_reward(kind)
    artefact.save(fitted, tmp_path / kind)
    loaded = load_reward(tmp_path / kind, parts_with(encoder))
    good, bad = RIGHT.format(7), WRONG.format(7)
    before = await FittedReward(fitted, encoder).score(ask(), answers(good, bad, ""))
    after = await loaded.score(ask(), answers(good, bad, ""))
    assert loaded.name == kind
    assert [s.value for s in after] == pytest.approx([s.value for s in before])
    assert all(np.isfinite(s.value) and s.parts for s in after)
    if kind != "uniform":
        assert after[0].value > after[1].value


@pytest.mark.parametrize("kind", ["armorm", "dmoerm"])
async def test_the_prompt_decides_what_is_better(kind, make_reward, encoder):
    reward = FittedReward(await make_reward(kind), encoder)
    good, bad = RIGHT.format(7), WRONG.format(7)
    sums = await reward.score(ask("sums"), answers(good, bad))
    chat = await reward.score(ask("chat"), answers(good, bad))
    assert sums[0].value > sums[1].value
    assert chat[0].value < chat[1].value


async def test_the_order_of_the_answers_does_not_matter(make_reward, encoder):
    reward = FittedReward(await make_reward("single"), encoder)
    texts = [RIGHT.format(7), WRONG.format(7), "", "The answer is (A).", "x" * 30_000]
    there = await reward.score(ask(), answers(*texts))
    back = await reward.score(ask(), answers(*reversed(texts)))
    assert [s.value for s in there] == pytest.approx([s.value for s in reversed(back)], abs=1e-5)


async def test_nothing_to_score_is_no_score(make_reward, encoder):
    reward = FittedReward(await make_reward("single"), encoder)
    assert await reward.score(ask(), []) == []


async def test_attacks_of_any_length_have_finite_rewards(make_reward, encoder):
    reward = FittedReward(await make_reward("armorm"), encoder)
    found = await reward.score(ask(), answers("a " * 100_000, "\0\ud800", ask().question * 50))
    assert all(np.isfinite(s.value) for s in found)


@pytest.fixture
async def folder(make_reward, tmp_path):
    artefact.save(await make_reward("single"), tmp_path / "reward")
    return tmp_path / "reward"


def write_again(folder, arrays):
    about = json.loads((folder / artefact.FORMAT.head).read_text())
    for stamp in ("version", "fitted_at", "sha256"):
        del about[stamp]
    artefact.FORMAT.write(folder, about, arrays)


async def test_another_encoder_is_refused_by_name(folder):
    class Other(Hashed):
        name = "other"

    class Wide(Hashed):
        width = 32

    with pytest.raises(ConfigError, match=r"'hashed' \(16 wide\).*'other'"):
        load_reward(folder, parts_with(Other()))
    with pytest.raises(ConfigError, match="32 wide"):
        load_reward(folder, parts_with(Wide()))


async def test_nan_in_an_artefact_is_refused(folder, encoder):
    arrays = load_file(folder / artefact.FORMAT.body)
    arrays["model.weight_D"][3] = np.nan
    write_again(folder, arrays)
    with pytest.raises(ConfigError, match=r"NaN or infinity in model\.weight_D"):
        load_reward(folder, parts_with(encoder))


async def test_an_artefact_of_the_wrong_width_is_refused(folder, encoder):
    arrays = load_file(folder / artefact.FORMAT.body)
    arrays["model.weight_D"] = arrays["model.weight_D"][:-5].copy()
    write_again(folder, arrays)
    with pytest.raises(ConfigError, match="features, an encoder 16 wide"):
        load_reward(folder, parts_with(encoder))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 99}, "version 99"),
        ({"kind": "nonsense"}, "broken"),
        ({"features": ["log_chars"]}, "other features"),
        ({"model": {}}, "broken"),
        ({"scaling": 3}, "broken"),
    ],
)
async def test_a_changed_head_is_refused(folder, encoder, change, match):
    head = json.loads((folder / artefact.FORMAT.head).read_text())
    (folder / artefact.FORMAT.head).write_text(json.dumps({**head, **change}))
    with pytest.raises(ConfigError, match=match):
        load_reward(folder, parts_with(encoder))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
async def test_a_head_that_is_no_head_is_refused(folder, encoder, content):
    (folder / artefact.FORMAT.head).write_bytes(content)
    with pytest.raises(ConfigError):
        load_reward(folder, parts_with(encoder))


async def test_a_cut_body_and_a_missing_folder_are_refused(folder, encoder, tmp_path):
    raw = (folder / artefact.FORMAT.body).read_bytes()
    (folder / artefact.FORMAT.body).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ConfigError, match="broken"):
        load_reward(folder, parts_with(encoder))
    with pytest.raises(ConfigError, match="collegium build reward"):
        load_reward(tmp_path / "nowhere", parts_with(encoder))


@pytest.mark.parametrize(
    ("about", "match"),
    [
        ({"kind": "http", "model": "m", "options": {"base_url": "ftp://x"}}, "http or https"),
        ({"kind": "http", "model": "m", "options": {"base_url": "http://x", "colour": 1}}, "colour"),
        ({"kind": "http", "model": "", "options": {}}, "'model' is a text"),
        ({"kind": "http", "model": "m", "optoins": {}}, "unknown key 'optoins'"),
        ({"kind": "vllm", "model": "m", "options": {"label": -1}}, "'label'"),
    ],
)
def test_a_wrong_external_reward_is_refused(tmp_path, encoder, about, match):
    (tmp_path / artefact.FORMAT.head).write_text(json.dumps({"version": 1, **about}))
    with pytest.raises(ConfigError, match=match):
        load_reward(tmp_path, parts_with(encoder))


def test_an_external_reward_is_made_like_any_other(tmp_path, encoder):
    about = {"version": 1, "kind": "http", "model": "judge", "options": {"base_url": "http://127.0.0.1:1"}}
    (tmp_path / artefact.FORMAT.head).write_text(json.dumps(about))
    assert load_reward(tmp_path, parts_with(encoder)).name == "http:judge"
