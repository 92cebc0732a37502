"""From files to samples and to an artefact, by hand and by ``collegium build reward``."""

import numpy as np
import pytest
from typer.testing import CliRunner

from experts.errors import ConfigError
from experts.pools import read_rows
from orchestrator.aggregators.reward_moe import artefact, attacks
from orchestrator.aggregators.reward_moe.build import Material, build_reward, read_material
from orchestrator.aggregators.reward_moe.corpus import make_corpus
from orchestrator.aggregators.reward_moe.samples import (
    draw_panels,
    pool_samples,
    preference_samples,
    read_answers,
    read_preferences,
    read_questions,
    split_of,
    written,
)
from orchestrator.cli import app
from routers.records import read_records
from tests.conftest import write_rows


def preference(number, **changes):
    row = {
        "prompt": f"Say something nice, number {number}.",
        "response_a": f"Of course: {number} flowers.",
        "response_b": "No.",
        "label": "a" if number % 5 else "tie",
    }
    return {**row, **changes}


@pytest.fixture
def texts_pool(make_pool):
    """The made-up pool with an answer's text for each."""
    folder = make_pool(questions=40)
    for path in (folder / "responses").glob("*.gz"):
        rows = [row for _, row in read_rows(path)]
        write_rows(path, [{**row, "text": f"So it is. The answer is ({row['answer']})."} for row in rows])
    return folder


def test_rows_that_are_no_preferences_are_named(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    for bad, match in (({"label": "c"}, "'label' is a, b or tie"), ({"response_b": None}, "'response_b' is a text")):
        write_rows(path, [preference(0), preference(1, **bad)])
        with pytest.raises(ConfigError, match=rf"p\.jsonl\.gz, row 2: {match}"):
            read_preferences(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match="not gzip"):
        read_preferences(path)


def test_an_answer_that_became_true_on_its_way_is_a_text_again(tmp_path):
    write_rows(tmp_path / "p.jsonl.gz", [preference(0, response_a=True)])
    assert read_preferences(tmp_path / "p.jsonl.gz")[0]["response_a"] == "True"


def test_a_prompt_is_in_one_split_whatever_else_there_is():
    splits = [split_of(f"prompt {i}", 0) for i in range(5000)]
    shares = {name: splits.count(name) / 5000 for name in ("train", "val", "test")}
    assert shares == pytest.approx({"train": 0.6, "val": 0.1, "test": 0.3}, abs=0.02)
    assert splits == [split_of(f"prompt {i}", 0) for i in range(5000)]
    assert splits != [split_of(f"prompt {i}", 1) for i in range(5000)]


def test_a_tie_teaches_no_pair(tmp_path):
    rows = [preference(i) for i in range(40)]
    samples = preference_samples(rows, "nice", "train", attacked=0.0, seed=0, split_seed=0)
    for sample in samples:
        halves = [labels["preferred:nice"] for labels in sample.labels]
        assert (sample.pairs, halves) in (((), [0.5, 0.5]), (((0, 1),), [1.0, 0.0]))


def test_graded_answers_beat_wrong_ones_and_attacks(texts_pool):
    records = read_records(texts_pool)
    drawn = draw_panels(records, records.rows("train"), sizes=(3,), seed=0)
    answers = read_answers(texts_pool, records, drawn)
    samples = pool_samples(records, read_questions(texts_pool), answers, drawn, attacked=1.0, seed=0)
    assert len(samples) == 20
    for sample in samples:
        grades = [labels["correct"] for labels in sample.labels]
        assert len(sample.panel.texts) == 4
        assert grades[3] == 0
        assert (sample.labels[3]["agreement"], sample.labels[3]["readable"]) == (0, 0)
        assert all(w < 3 and (loser == 3 or grades[w] > grades[loser]) for w, loser in sample.pairs)
        assert any(loser == 3 for _, loser in sample.pairs)
        assert sample.panel.question == written(sample.panel.question.split("\n")[0], ["a", "b", "c", "d"])
        assert 0 <= sample.labels[0]["agreement"] <= 1


def test_attacks_that_are_measured_were_never_learned_from():
    for kind in attacks.KINDS:
        assert not set(attacks.TRAIN[kind]) & set(attacks.HELD_OUT[kind])
        assert attacks.attack(kind, "What is red?", attacks.HELD_OUT, np.random.default_rng(0))
    assert "What is red?" in attacks.attack("copied_question", "What is red?", attacks.TRAIN, np.random.default_rng(0))


def test_a_pool_without_texts_is_refused(make_pool):
    with pytest.raises(ConfigError, match="no texts of answers"):
        read_material([make_pool()], [], seed=0)


def test_folders_without_preferences_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no \*\.jsonl\.gz"):
        read_material([], [tmp_path], seed=0)
    write_rows(tmp_path / "p.jsonl.gz", [preference(0)])
    with pytest.raises(ConfigError, match="nothing to learn from"):
        read_material([], [tmp_path], seed=0)


async def test_labels_of_other_sources_are_missing(texts_pool, tmp_path, encoder):
    write_rows(tmp_path / "nice.jsonl.gz", [preference(i) for i in range(40)])
    material = read_material([texts_pool], [tmp_path / "nice.jsonl.gz"], seed=0)
    corpus = await make_corpus(material.samples, encoder, tmp_path / "cache")
    graded = np.array([source == "toy" for source in corpus.sources])[corpus.inputs.prompt_N]
    known = ~np.isnan(corpus.labels_NO[:, corpus.objectives.index("correct")])
    assert (known == graded).all()
    assert not np.isnan(corpus.labels_NO[:, corpus.objectives.index("verbosity")]).any()
    assert [s.name for s in material.sources] == ["toy", "nice"]
    weights = corpus.weights_K
    own = np.array(corpus.sources)[corpus.inputs.prompt_N[corpus.pairs_K2[:, 0]]]
    assert weights[own == "nice"].sum() == pytest.approx((own == "nice").sum() ** 0.5)


async def test_an_unknown_kind_is_refused(material: Material, encoder, tmp_path):
    with pytest.raises(ConfigError, match="No reward 'best'; known: armorm"):
        await build_reward("best", material, encoder, tmp_path, seed=0)


def test_the_command_writes_what_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "nice.jsonl.gz", [preference(i) for i in range(120)])
    arguments = ["build", "reward", "--preferences", str(tmp_path / "nice.jsonl.gz"), "--kind", "single"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    fitted = artefact.load(tmp_path / "out")
    assert (fitted.kind, fitted.encoder, fitted.sources[0].name) == ("single", "wordllama", "nice")
    assert len(fitted.sources[0].digest) == 64
    assert f"Warning: {fitted.pairs} pairs are few for a reward" in " ".join(result.output.split())


def test_the_command_says_what_is_missing(tmp_path):
    result = CliRunner().invoke(app, ["build", "reward", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    result = CliRunner().invoke(app, ["build", "reward", "--pool", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
