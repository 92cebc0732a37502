import json

from evals.batching.real import KINDS, compare, read_answers, write_lines
from orchestrator.batches.lines import read_envelope


def report(**figures):
    return dict.fromkeys(("loads", "load_s", "generate_s", "wall_s", "expert_calls", "lost", "duplicated"), 0) | figures


def test_the_lines_are_ninety_questions_in_one_order(tmp_path):
    path = write_lines(tmp_path)
    lines = path.read_bytes().splitlines()
    asked = {read_envelope(line).body["messages"][0]["content"] for line in lines}
    assert len(lines) == len(asked) == sum(map(len, KINDS.values())) == 90
    assert write_lines(tmp_path).read_bytes().splitlines() == lines


def test_compare_counts_answers_that_differ_or_are_missing(tmp_path):
    reports = {"grouped": report(wall_s=10.0), "arrival": report(wall_s=70.0)}
    answers = {"grouped": {"a": "x", "b": "y", "c": "z"}, "arrival": {"a": "x", "b": "other"}}
    told = list(compare(reports, answers))
    assert told[-2:] == ["wall time, arrival / grouped: 7.0", "answers that are the same: 1 of 3"]
    row = {"custom_id": "a", "response": {"body": {"choices": [{"message": {"content": "x"}}]}}}
    (tmp_path / "out.jsonl").write_text(json.dumps(row) + "\n")
    assert read_answers(tmp_path / "out.jsonl") == {"a": "x"}
