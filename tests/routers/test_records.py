import gzip
import json

import numpy as np
import pytest

from experts.errors import ConfigError
from routers.costs import costs
from routers.records import read_records


def rewrite(folder, name, change):
    path = folder / name
    if name.endswith(".gz"):
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        change(rows)
        path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
        return
    head = json.loads(path.read_text())
    change(head)
    path.write_text(json.dumps(head))


def test_a_pool_becomes_arrays_with_one_column_an_expert(make_pool):
    records = read_records(make_pool(questions=40))
    assert records.scores_QE.shape == (40, 4)
    assert records.answered_QE.all()
    assert records.texts[0] == "solve the equation for x number 0\na\nb\nc\nd"
    assert records.tasks[:5] == ("algebra", "law", "cells", "prices", "algebra")
    assert list(records.rows("test")) == list(range(20, 40))
    skilled = records.scores_QE[np.arange(40), np.arange(40) % 4]
    assert skilled.mean() > records.scores_QE.mean()


def test_equal_answers_have_equal_numbers(make_pool):
    folder = make_pool(questions=8)
    rewrite(folder, "responses/law-expert.jsonl.gz", lambda rows: rows[0].update(answer=None))
    records = read_records(folder)
    assert records.answers_QE[0, 1] == -1
    named = {records.answer_texts[c] for c in records.answers_QE.ravel() if c >= 0}
    assert named <= set("ABCD")
    right = records.scores_QE[:, 0] == 1
    both = right & (records.scores_QE[:, 2] == 1)
    assert (records.answers_QE[both, 0] == records.answers_QE[both, 2]).all()


def test_a_missing_response_scores_0_and_is_told_from_a_wrong_one(make_pool):
    folder = make_pool(questions=8)
    rewrite(folder, "responses/law-expert.jsonl.gz", lambda rows: rows.pop(3))
    records = read_records(folder)
    assert not records.answered_QE[3, 1]
    assert records.scores_QE[3, 1] == 0
    assert records.answered_QE.sum() == 31


def test_experts_can_be_chosen_and_the_digest_follows(make_pool):
    folder = make_pool(questions=8)
    few = read_records(folder, ["prices-expert", "law-expert"])
    assert few.expert_ids == ("prices-expert", "law-expert")
    assert few.digest != read_records(folder).digest
    with pytest.raises(ConfigError, match="no expert 'nobody'; known: algebra-expert"):
        read_records(folder, ["nobody"])
    with pytest.raises(ConfigError, match="each expert once"):
        read_records(folder, ["law-expert", "law-expert"])
    with pytest.raises(ConfigError, match="at least one: none given"):
        read_records(folder, [])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("questions.jsonl.gz", lambda rows: rows[2].update(id="q0"), "row 3: the id 'q0'"),
        ("questions.jsonl.gz", lambda rows: rows[2].update(task=None), "row 3: 'task' is a text"),
        ("questions.jsonl.gz", lambda rows: rows[2].pop("question"), "row 3: 'question' is missing or blank"),
        ("questions.jsonl.gz", lambda rows: rows[2].update(question=" "), "row 3: 'question' is missing or blank"),
        ("responses/law-expert.jsonl.gz", lambda rows: rows[4].update(id="q0"), "row 5: question 'q0'"),
        ("responses/law-expert.jsonl.gz", lambda rows: rows[4].update(score=float("nan")), "row 5 is not JSON"),
        ("responses/law-expert.jsonl.gz", lambda rows: rows[4].update(score=1.5), "row 5: 'score'"),
        ("responses/law-expert.jsonl.gz", lambda rows: rows.clear(), "has no row"),
        ("pool.json", lambda head: head["splits"]["train"].append("q99"), "split 'train', entry 5: no question 'q99'"),
        ("pool.json", lambda head: head["splits"]["test"].append("q0"), "entry 5: question 'q0' is in 'train'"),
        ("pool.json", lambda head: head["experts"][1].update(params_b="big"), "'law-expert': 'params_b'"),
        ("pool.json", lambda head: head.pop("splits"), "'splits' names"),
        ("pool.json", lambda head: head["splits"].update(val=None), "split 'val' is a list of question ids, got None"),
        ("pool.json", lambda head: head["splits"].update(val="q7"), "split 'val' is a list of question ids, got 'q7'"),
        ("pool.json", lambda head: head["splits"].update(val=[["q7"]]), r"split 'val', entry 1: no question \['q7'\]"),
    ],
)
def test_a_bad_pool_is_an_error_that_names_the_place(make_pool, name, change, message):
    folder = make_pool(questions=8)
    rewrite(folder, name, change)
    with pytest.raises(ConfigError, match=message):
        read_records(folder)


def test_an_empty_split_is_an_error_that_names_the_others(make_pool):
    records = read_records(make_pool(questions=8))
    with pytest.raises(ConfigError, match=r"split 'val' is empty; there are train \(4\), test \(4\)"):
        records.rows("val")


def test_costs_use_the_best_unit_that_all_experts_have(make_pool):
    folder = make_pool(questions=8)
    cost, unit = costs(read_records(folder))
    assert unit == "params_b x chars"
    assert cost[0].tolist() == [100, 200, 300, 400]
    for expert in ("algebra", "law", "cells", "prices"):
        rewrite(folder, f"responses/{expert}-expert.jsonl.gz", lambda rows: [row.update(usd=0.5) for row in rows[1:]])
    cost, unit = costs(read_records(folder))
    assert unit == "usd"
    assert (cost == 0.5).all(), "a gap is filled with the expert's mean"
    for expert in ("algebra", "law", "cells", "prices"):
        rewrite(folder, f"responses/{expert}-expert.jsonl.gz", lambda rows: [row.update(usd=0.0) for row in rows])
    assert costs(read_records(folder))[1] == "params_b x chars", "where all is free, prices tell nobody apart"


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_split_with_one_class_only_is_named_with_its_pool(make_pool, score):
    folder = make_pool(questions=8)
    for expert in ("algebra", "law", "cells", "prices"):
        rewrite(folder, f"responses/{expert}-expert.jsonl.gz", lambda rows: [r.update(score=score) for r in rows])
    records = read_records(folder)
    with pytest.raises(ConfigError, match=rf"Pool 'toy', split 'train'.* is {score:g} \(4 questions\)"):
        records.lessons("train")
    assert len(records.rows("train")) == 4
