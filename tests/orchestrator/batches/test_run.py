import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError, Unavailable
from experts.types import Chunk, ChunkStream, ExpertSpec, Request
from orchestrator.batches import session
from orchestrator.policies import Overrides
from tests.orchestrator.batches.batch import Batch, config, line


@pytest.fixture
def batch(tmp_path):
    return Batch(tmp_path)


async def test_answers_lie_in_the_order_of_the_lines(batch):
    batch.write([line(f"q{i}", model="collegium/single") for i in range(30)])
    report = await batch.run()
    assert [row["custom_id"] for row in batch.rows()] == [f"q{i}" for i in range(30)]
    assert batch.answers()["q0"] == "one heard: What of q0?"
    assert {key: report[key] for key in ("requests", "expert_calls", "loads", "lost", "duplicated", "errors")} == {
        "requests": 30,
        "expert_calls": 30,
        "loads": 3,
        "lost": 0,
        "duplicated": 0,
        "errors": 0,
    }
    assert json.loads((batch.folder / "out.report.json").read_bytes()) == report
    assert sorted(path.name for path in batch.folder.iterdir()) == ["in.jsonl", "out.jsonl", "out.report.json"]


async def test_a_row_is_openais(batch):
    batch.write([line("q", model="two")])
    await batch.run()
    (row,) = batch.rows()
    assert set(row) == {"id", "custom_id", "response", "error"}
    assert row["id"].startswith("batch_req_")
    assert row["response"]["status_code"] == 200
    assert row["response"]["request_id"] == row["response"]["body"]["id"]
    assert row["response"]["body"]["object"] == "chat.completion"
    assert row["response"]["body"]["usage"]["total_tokens"] > 0
    assert row["error"] is None


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(24)), resident=st.integers(1, 3))
async def test_each_engine_is_loaded_once_whatever_the_order_of_lines(tmp_path_factory, order, resident):
    batch = Batch(tmp_path_factory.mktemp("batch"))
    batch.write([line(f"q{i}", model=("one", "two", "three")[i % 3]) for i in order])
    report = await batch.run(resident=resident)
    assert report["loads"] == 3
    assert len(batch.rows()) == 24


async def test_both_orders_answer_alike(tmp_path):
    lines = [line(f"q{i}", temperature=0, collegium={"seed": i}) for i in range(20)]
    answers, loads = {}, {}
    for order in ("grouped", "arrival"):
        (tmp_path / order).mkdir()
        batch = Batch(tmp_path / order)
        batch.write(lines)
        loads[order] = (await batch.run(order=order))["loads"]
        answers[order] = batch.answers()
    assert answers["grouped"] == answers["arrival"]
    assert loads["grouped"] == 3
    assert loads["arrival"] >= 20  # two experts a line, room for one


async def test_experts_on_one_engine_share_its_load(tmp_path):
    settings = config()
    settings["experts"] |= {"four": {"engine": "a"}, "five": {"engine": "a"}}
    batch = Batch(tmp_path, settings)
    batch.write([line(f"q{i}", model=m) for i, m in enumerate(("one", "five", "four", "one"))])
    assert (await batch.run())["loads"] == 1


async def test_completions_embeddings_and_the_commands_overrides(batch):
    completion = {"custom_id": "c", "method": "POST", "url": "/v1/completions"}
    batch.write(
        [{**completion, "body": {"model": "collegium", "prompt": "Once"}}, line("q"), line("three", model="three")]
    )
    report = await batch.run(overrides=Overrides(router="always", top_k=1))
    first, second, third = batch.rows()
    assert first["response"]["body"]["object"] == "text_completion"
    assert first["response"]["body"]["choices"][0]["text"] == "one heard: Once"
    assert second["response"]["body"]["model"] == "one"
    assert third["response"]["body"]["model"] == "three"  # an expert by name is not routed
    assert report["expert_calls"] == 3


async def test_a_line_may_override_its_policy_and_ask_for_the_explanation(batch):
    own = {"router": "always", "top_k": 3, "explain": True}
    batch.write([line("q", collegium=own), line("one", model="one", collegium={"explain": True})])
    report = await batch.run()
    told = batch.rows()[0]["response"]["body"]["collegium"]
    assert [call["expert_id"] for call in told["calls"]] == ["one", "two", "three"]
    assert told["decision"]["router"] == "always"
    assert told["trace"]["winner"]
    assert batch.rows()[1]["response"]["body"]["collegium"]["calls"][0]["expert_id"] == "one"
    assert report["expert_calls"] == 4


async def test_several_choices_of_one_expert(batch):
    batch.write([line("q", model="one", n=3)])
    await batch.run()
    assert [c["index"] for c in batch.rows()[0]["response"]["body"]["choices"]] == [0, 1, 2]


BAD = [
    (b"not json", "invalid_json_line", None),
    (b'["a"]', "invalid_json_line", None),
    (b"\xff\xfe", "invalid_json_line", None),
    (b"[" * 2000, "invalid_json_line", None),
    (json.dumps(line("good")).encode(), "duplicate_custom_id", "good"),
    (json.dumps({**line("u"), "url": "/v1/images"}).encode(), "invalid_url", "u"),
    (json.dumps({**line("m"), "method": "GET"}).encode(), "bad_request", "m"),
    (json.dumps({**line("k"), "extra": 1}).encode(), "bad_request", "k"),
    (json.dumps({**line("i"), "custom_id": 7}).encode(), "bad_request", None),
    (json.dumps(line("w", model="nobody")).encode(), "not_found", "w"),
    (json.dumps(line("t", temperature=9)).encode(), "bad_request", "t"),
    (json.dumps(line("s", stream=True)).encode(), "bad_request", "s"),
    (json.dumps(line("c", collegium={"router": "none"})).encode(), "bad_request", "c"),
    (json.dumps(line("n", n=2)).encode(), "bad_request", "n"),
    (json.dumps(line("usd", collegium={"max_usd": 1e-9})).encode(), None, "usd"),
    (b'{"custom_id": "big", "pad": "' + b"x" * 5_000_000 + b'"}', "request_too_large", None),
]


async def test_bad_lines_are_told_with_their_numbers_and_the_rest_runs(batch):
    batch.write([line("good"), b"", *(raw for raw, _, _ in BAD), line("last")])
    report = await batch.run()
    assert [row["custom_id"] for row in batch.rows()] == ["good", "usd", "last"]
    expected = [(n, code, name) for n, (_, code, name) in enumerate(BAD, start=3) if code]
    assert [(r["error"]["line"], r["error"]["code"], r["custom_id"]) for r in batch.errors] == expected
    assert all(r["response"]["status_code"] >= 400 and r["response"]["body"]["error"] for r in batch.errors)
    assert (report["requests"], report["errors"], report["lost"]) == (18, 15, 0)


async def test_an_answer_with_strange_line_breaks_stays_on_one_line(tmp_path):
    batch = Batch(tmp_path, config(a={"text": "one\u2028two\u2029three\x85four\x0bfive"}))
    batch.write([line("q", model="one"), line("b\u2028d", model="nobody")])
    await batch.run()
    assert batch.answers() == {"q": "one\u2028two\u2029three\x85four\x0bfive"}  # split at each of them by rows()
    assert [row["custom_id"] for row in batch.errors] == ["b\u2028d"]


async def test_a_custom_id_that_stands_twice_is_told_of_embeddings_too(batch):
    def embedding(name):
        return {**line(name), "url": "/v1/embeddings", "body": {"model": "collegium", "input": "text"}}

    batch.write([embedding("a"), embedding("a"), line("a", model="one"), embedding("b"), line("a", model="nobody")])
    report = await batch.run()
    assert [row["custom_id"] for row in batch.rows()] == ["a", "b"]
    assert [(r["error"]["line"], r["error"]["code"]) for r in batch.errors] == [
        (2, "duplicate_custom_id"),
        (3, "duplicate_custom_id"),
        (5, "not_found"),
    ]
    assert (report["requests"], report["errors"], report["lost"], report["duplicated"]) == (5, 3, 0, 0)


async def test_nothing_but_bad_lines_loads_nothing(batch):
    batch.write([b"x", b"y"])
    report = await batch.run()
    assert (report["loads"], report["errors"], batch.rows()) == (0, 2, [])


async def test_an_empty_file(batch):
    batch.write([])
    assert (await batch.run())["requests"] == 0
    assert batch.rows() == []


async def test_an_engine_that_does_not_load_gives_its_lines_to_the_next_best(tmp_path):
    batch = Batch(tmp_path, config(a={"fail": ["load"]}))
    batch.write([line(f"q{i}", collegium={"router": "always", "top_k": 1}) for i in range(5)])
    report = await batch.run()
    assert {row["response"]["body"]["model"] for row in batch.rows()} == {"two"}
    assert report["lost"] == 0


async def test_an_endpoint_that_is_down_for_a_moment_costs_no_line(tmp_path):
    settings = config(a={"fail": ["ok", *["refuse"] * 2, "ok"]})
    settings["resilience"] |= {"breaker_failures": 1}
    batch = Batch(tmp_path, settings)
    batch.write([line(f"q{i}", model="one") for i in range(10)])
    await batch.run(window=1)
    assert len(batch.rows()) == 8  # the two that were refused; the others waited for the breaker


async def test_an_engine_that_dies_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.batches.work.PATIENCE_S", 0.1)
    batch = Batch(tmp_path, config(b={"fail": ["ok", "ok", "ok", "refuse"]}))
    batch.write([line(f"q{i}", collegium={"router": "always", "top_k": 3}) for i in range(12)])
    report = await batch.run(window=1)
    assert len(batch.rows()) == 12  # the others' answers are voted on
    assert report["errors"] == 0
    batch = Batch(tmp_path, config(b={"fail": ["ok", "refuse"]}))
    batch.write([line(f"q{i}", model="two") for i in range(3)])
    await batch.run(window=1)
    assert [row["custom_id"] for row in batch.rows()] == ["q0"]
    assert [(r["error"]["code"], r["response"]["status_code"]) for r in batch.errors] == [("expert_failed", 503)] * 2


async def test_a_spare_is_asked_once_a_line_and_calls_stay_within_the_limit(tmp_path):
    batch = Batch(tmp_path, config(a={"fail": ["refuse"]}, b={"fail": ["refuse"]}))
    batch.write(
        [
            line("q", collegium={"router": "always", "top_k": 2}),
            line("p", collegium={"router": "always", "top_k": 1, "max_calls": 2}),
        ]
    )
    await batch.run()
    assert batch.answers() == {"q": "three heard: What of q?"}
    assert [r["custom_id"] for r in batch.errors] == ["p"]
    assert batch.engines["c"].calls == 1


async def test_nothing_waits_long_for_an_engine_that_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.batches.work.PATIENCE_S", 0.1)
    batch = Batch(tmp_path, config(a={"fail": ["refuse"]}))
    batch.write([line(f"q{i}", model="one") for i in range(200)])
    report = await batch.run()
    assert (report["errors"], report["lost"]) == (200, 0)
    assert {r["error"]["code"] for r in batch.errors} == {"expert_failed", "breaker_open"}


async def test_when_all_fail_the_best_experts_failure_is_told(tmp_path):
    refuse = {"fail": ["refuse"]}
    batch = Batch(tmp_path, config(a=refuse, b=refuse, c=refuse))
    batch.write([line("q", collegium={"router": "always"})])
    report = await batch.run()
    (row,) = batch.errors
    assert "'one'" in row["error"]["message"]
    assert (report["errors"], report["lost"], report["expert_calls"]) == (1, 0, 3)


async def test_an_engine_with_a_short_memory_passes_a_long_line_on(tmp_path):
    batch = Batch(tmp_path, config(a={"context_length": 3}))
    batch.write([line("q", text="one two three four five", collegium={"router": "always", "top_k": 1})])
    await batch.run()
    assert batch.rows()[0]["response"]["body"]["model"] == "two"


async def test_a_bug_in_an_engine_is_a_line_in_the_error_file(batch):
    class Broken:
        def __init__(self, inner):
            self.spec, self.load, self.unload = inner.spec, inner.load, inner.unload

        async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
            raise RuntimeError("a bug")
            yield Chunk(expert_id="x")

    batch.write([line("q", model="one"), line("p", model="two")])
    await batch.run(wrap=lambda engine: Broken(engine) if engine.spec.engine_id == "a" else engine)
    assert [r["custom_id"] for r in batch.rows()] == ["p"]
    assert batch.errors[0]["error"]["code"] == "internal_error"


async def test_an_aggregator_that_asks_experts_waits_for_all_calls(tmp_path):
    """Its engine comes back once, not for each line."""
    settings = config()
    fuse = {"name": "fuse", "options": {"expert": "one"}}
    settings["policies"]["default"] = {"router": "always", "top_k": 3, "aggregator": fuse}
    batch = Batch(tmp_path, settings)
    batch.write([line(f"q{i}", collegium={"explain": True}) for i in range(10)])
    report = await batch.run()
    assert (report["expert_calls"], report["errors"], report["lost"]) == (40, 0, 0)
    assert report["loads"] <= 4
    assert len(batch.rows()[0]["response"]["body"]["collegium"]["calls"]) == 4


async def test_a_long_file_is_read_in_pages(batch, monkeypatch):
    monkeypatch.setattr(session, "PAGE", 5)
    monkeypatch.setattr("orchestrator.batches.plan.STRETCH_LINES", 7)
    batch.write([line(f"q{i}") for i in range(40)])
    report = await batch.run()
    assert (len(batch.rows()), report["loads"], report["expert_calls"]) == (40, 3, 80)


async def test_a_changed_input_is_refused(batch):
    batch.write([line(f"q{i}", model="one") for i in range(4)])
    await cut_off(batch)
    batch.write([line("other", model="one")])
    with pytest.raises(ConfigError, match="has changed since"):
        await batch.run()


async def test_the_order_cannot_change_in_the_middle(batch):
    batch.write([line(f"q{i}", model="one") for i in range(4)])
    await cut_off(batch)
    with pytest.raises(ConfigError, match="--order grouped"):
        await batch.run(order="arrival")


async def test_two_processes_cannot_work_on_one_batch(batch):
    batch.write([line("q", model="one")])
    first = asyncio.create_task(batch.run(wrap=lambda engine: _Slow(engine, 0.3)))
    await asyncio.sleep(0.1)
    other = Batch(batch.folder)
    with pytest.raises(ConfigError, match="Another process"):
        await other.run()
    assert (await first)["lost"] == 0


async def test_progress_says_lines_and_loads(batch):
    batch.write([line(f"q{i}") for i in range(20)])
    await batch.run()
    assert next(p.stage for p in batch.progress) == "reading"
    last = batch.progress[-1]
    assert (last.stage, last.tally.requests, last.tally.settled, last.tally.loads) == ("writing", 20, 20, 3)
    assert last.tally.completion_tokens > 0


async def cut_off(batch):
    """A run that is cancelled in the middle of its calls."""
    task = asyncio.create_task(batch.run(wrap=lambda engine: _Slow(engine, 30)))
    while not (batch.progress and batch.engines["a"].loaded):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class _Slow:
    def __init__(self, inner, pause_s):
        self.spec, self.load, self.unload = inner.spec, inner.load, inner.unload
        self._inner, self._pause_s = inner, pause_s

    async def generate(self, request, expert):
        await asyncio.sleep(self._pause_s)
        async for chunk in self._inner.generate(request, expert):
            yield chunk


async def test_a_disk_that_fills_up_is_a_clean_stop(batch, monkeypatch):
    from orchestrator.batches.store import Store

    batch.write([line(f"q{i}", model="one") for i in range(20)])
    settle, calls = Store.settle, []

    def full(self, *given):
        calls.append(1)
        if len(calls) > 3:
            import sqlite3

            with self._transaction():
                raise sqlite3.OperationalError("database or disk is full")
        return settle(self, *given)

    monkeypatch.setattr(Store, "settle", full)
    with pytest.raises(Unavailable, match="--resume"):
        await batch.run(window=1)
    monkeypatch.undo()
    assert not (batch.folder / "out.jsonl").exists()
    report = await batch.run()
    assert (report["lost"], report["duplicated"], len(batch.rows())) == (0, 0, 20)
    assert batch.asked == 17  # three were answered and filed before
