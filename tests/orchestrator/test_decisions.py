"""Decisions: the last ones only, over restarts, and never in the way of a request."""

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from experts.errors import ConfigError, Unavailable
from experts.types import Request
from orchestrator.aggregators.first import First
from orchestrator.decisions import DecisionLog, MemoryShelf, SqliteShelf
from orchestrator.run import Policy, Run
from routers.base import decide
from routers.baseline import Direct
from tests.orchestrator.served import Served, fake_config, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "a secret question"}]


def ask(served: Served, **keys: Any) -> str:
    reply = served.http.post("/v1/chat/completions", json={"model": "collegium", "messages": ASK, **keys})
    return str(reply.headers["x-collegium-decision"])


def read(served: Served, request_id: str) -> Any:
    return served.http.get(f"/v1/decisions/{request_id}")


@pytest.fixture(params=["memory", "sqlite"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {"keep": 5} if request.param == "memory" else {"keep": 5, "path": str(tmp_path / "decisions.db")}


def test_what_is_read_back(kept: dict[str, Any]) -> None:
    with serving(fake_config({"decisions": kept})) as served:
        body = {"model": "collegium", "messages": ASK, "collegium": {"explain": True}}
        told = served.http.post("/v1/chat/completions", json=body).json()
        assert read(served, told["id"]).json() == told["collegium"]
        assert "secret" not in read(served, told["id"]).text  # neither question nor answer


def test_every_end_is_kept(kept: dict[str, Any]) -> None:
    with serving(fake_config({"decisions": kept}, fail=["ok", "refuse"])) as served:
        ids = [ask(served), ask(served), ask(served, stream=True)]
        assert [read(served, i).json()["error"] for i in ids] == [None, "expert_failed", "expert_failed"]


def test_only_the_last_ones(kept: dict[str, Any]) -> None:
    with serving(fake_config({"decisions": kept})) as served:
        ids = [ask(served) for _ in range(12)]
        if "path" in kept:
            wait_for(lambda: stored(Path(kept["path"])) == set(ids[-5:]))
        assert [read(served, i).status_code for i in ids] == [404] * 7 + [200] * 5


def test_over_a_restart(tmp_path: Path) -> None:
    config = fake_config({"decisions": {"path": str(tmp_path / "decisions.db")}})
    with serving(config) as served:
        ids = [ask(served) for _ in range(3)]
    with serving(config) as served:
        assert [read(served, i).status_code for i in ids] == [200] * 3
        assert read(served, ask(served)).status_code == 200


def stored(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as db:
        return {row[0] for row in db.execute("SELECT request_id FROM decisions")}


def rows(path: Path) -> int:
    return len(stored(path))


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "decisions.db"


async def test_a_row_can_be_read_at_once(path: Path, complaints: list[str]) -> None:
    with closing(SqliteShelf(path, 10, complaints.append)) as shelf:
        shelf.put("a", ("ann", b"1"))
        assert await shelf.get("a") == ("ann", b"1")
        wait_for(lambda: rows(path) == 1)
        assert await shelf.get("a") == ("ann", b"1")
        assert await shelf.get("b") is None
    assert complaints == []


async def test_many_threads_put_while_others_read(path: Path, complaints: list[str]) -> None:
    with closing(SqliteShelf(path, 100_000, complaints.append)) as shelf:

        def put(name: int) -> None:
            for i in range(500):
                shelf.put(f"{name}-{i}", (None, b"x"))

        threads = [threading.Thread(target=put, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for i in range(100):
            row = await shelf.get(f"0-{i}")
            assert row in (None, (None, b"x"))
        for thread in threads:
            thread.join()
        found = await asyncio.gather(*(shelf.get(f"{n}-{i}") for n in range(4) for i in range(0, 500, 50)))
        assert found == [(None, b"x")] * 40
    assert rows(path) == 2000
    assert complaints == []


async def test_two_processes_may_share_a_file(path: Path, complaints: list[str]) -> None:
    with (
        closing(SqliteShelf(path, 10, complaints.append)) as one,
        closing(SqliteShelf(path, 10, complaints.append)) as two,
    ):
        one.put("a", (None, b"1"))
        wait_for(lambda: rows(path) == 1)
        assert await two.get("a") == (None, b"1")


def make_file_wrong(path: Path) -> None:
    path.write_bytes(b"this is no database, and it is longer than SQLite's header of a hundred bytes" * 3)


def make_it_a_folder(path: Path) -> None:
    path.mkdir()


def make_other_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE decisions (a, b)")


def make_no_folder(path: Path) -> None:
    path.parent.rmdir()


@pytest.mark.parametrize("spoil", [make_file_wrong, make_it_a_folder, make_other_table, make_no_folder])
def test_a_file_that_cannot_be_used(path: Path, complaints: list[str], spoil: Any) -> None:
    spoil(path)
    with pytest.raises(ConfigError, match=r"decisions\.path"):
        SqliteShelf(path, 10, complaints.append)


def test_a_disk_that_cannot_be_written(complaints: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"decisions\.path"):
        SqliteShelf(Path("/proc/decisions.db"), 10, complaints.append)


def test_a_disk_that_fills_up(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Answers go on; what cannot be kept is dropped, and the log says so, once."""
    with serving(fake_config({"decisions": {"path": str(path)}})) as served:
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TRIGGER full BEFORE INSERT ON decisions BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
            db.commit()
        lost = [ask(served) for _ in range(3)]
        wait_for(lambda: "disk is full" in caplog.text)
        ask(served)
        wait_for(lambda: read(served, lost[0]).status_code == 404)
        with closing(sqlite3.connect(path)) as db:
            db.execute("DROP TRIGGER full")
            db.commit()
        kept = ask(served)
        wait_for(lambda: rows(path) >= 1)
        assert read(served, kept).status_code == 200
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1


async def test_a_disk_that_is_behind(path: Path, complaints: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SqliteShelf, "BACKLOG", 3)
    with closing(SqliteShelf(path, 10, complaints.append)) as shelf:
        for i in range(10):
            shelf.put(str(i), (None, b"x"))
        wait_for(lambda: complaints)
        assert [await shelf.get(str(i)) is not None for i in range(10)] == [True] * 3 + [False] * 7
    assert "7" in complaints[0]


async def test_a_file_that_is_gone(path: Path, complaints: list[str]) -> None:
    with closing(SqliteShelf(path, 10, complaints.append)) as shelf:
        path.unlink()
        with pytest.raises(Unavailable, match="cannot be read"):
            await shelf.get("a")


async def test_a_locked_file_stops_nobody(path: Path, complaints: list[str]) -> None:
    """Neither who answers nor who reads waits for another process to let go."""
    with closing(SqliteShelf(path, 10, complaints.append)) as shelf:
        with closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            shelf.put("a", (None, b"1"))
            time.sleep(2 * SqliteShelf.BATCH_S)
            assert await shelf.get("a") == (None, b"1")
            other.rollback()
        wait_for(lambda: rows(path) == 1)


def write_and_die(path: Path) -> None:
    shelf = SqliteShelf(path, 10, print)
    shelf.put("a", (None, b"1"))
    wait_for(lambda: rows(path) == 1)
    os.kill(os.getpid(), signal.SIGKILL)


async def test_a_killed_process_keeps_its_rows(path: Path, complaints: list[str]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with closing(SqliteShelf(path, 10, complaints.append)) as shelf:
        assert await shelf.get("a") == (None, b"1")


async def test_memory_is_bounded() -> None:
    shelf = MemoryShelf(3)
    for i in range(10):
        shelf.put(str(i), (None, b"x"))
    assert [await shelf.get(str(i)) is not None for i in range(10)] == [False] * 7 + [True] * 3


def test_a_row_is_small() -> None:
    """orjson's own bytes kept 4 KB each; nothing in Python shows that but the memory they take."""
    log, runs = DecisionLog(MemoryShelf(2000)), [ended_run() for _ in range(2000)]
    before = resident_bytes()
    for run in runs:
        log.ended(run)
    assert resident_bytes() - before < 2000 * 2000


def ended_run() -> Run:
    policy = Policy(name="default", router=Direct("one"), aggregator=First())
    scores = {f"expert-{i}": 0.1 for i in range(3)}
    return Run(
        request=Request(prompt="x"),
        policy=policy,
        decision=decide(scores, reason="because", router="direct"),
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
