"""A batch and online requests in one service whose engines take turns."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest

from experts.fake import FakeEngine
from experts.types import ChunkStream, EngineSpec, ExpertSpec, Request
from tests.orchestrator.batches.batch import line
from tests.orchestrator.batches.test_batches_http import CHAT, ENDED, begin, ended, rows
from tests.orchestrator.served import Served, serving

MODELS = ("A", "B", "C")


class Room:
    """Who is loaded now; ``faults`` are what must never be."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.loaded: set[str] = set()
        self.loads: list[str] = []
        self.faults: list[str] = []

    def make(self, spec: EngineSpec) -> "Watched":
        return Watched(spec, self)


class Watched(FakeEngine):
    def __init__(self, spec: EngineSpec, room: Room) -> None:
        super().__init__(spec)
        self._room = room

    async def load(self) -> None:
        self._room.loaded.add(self.spec.engine_id)
        self._room.loads.append(self.spec.engine_id)
        if len(self._room.loaded) > self._room.slots:
            self._room.faults.append(f"{self._room.loaded} at a time")
        await super().load()

    async def unload(self) -> None:
        if self.running:
            self._room.faults.append(f"{self.spec.engine_id} unloaded under {self.running} calls")
        await super().unload()
        self._room.loaded.discard(self.spec.engine_id)

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        if not self.loaded:
            self._room.faults.append(f"{self.spec.engine_id} asked while it was not there")
        async with aclosing(super().generate(request, expert)) as chunks:
            async for chunk in chunks:
                yield chunk


def config(folder: Any, **residency: Any) -> dict[str, Any]:
    options = {"load_s": 0.05, "unload_s": 0.01, "ttft_s": 0.02}
    return {
        "engines": {m.lower(): {"backend": "fake", "options": options} for m in MODELS},
        "experts": {m: {"engine": m.lower()} for m in MODELS},
        "policies": {
            "default": {"router": "round_robin", "top_k": 2, "aggregator": "vote"},
        },
        "resilience": {"retries": 0},
        "residency": {"max_wait_s": 0.5, "min_loaded_s": 0.05, **residency},
        "batches": {"path": str(folder), "window": 8},
    }


@pytest.fixture(params=[1, 2])
def room(request: pytest.FixtureRequest) -> Room:
    return Room(slots=request.param)


@pytest.fixture
def served(room: Room, tmp_path: Any) -> Iterator[Served]:
    with serving(config(tmp_path / "batches", slots=room.slots), make=room.make) as running:
        yield running


def content(count: int) -> bytes:
    return "".join(json.dumps(line(f"q{i}")) + "\n" for i in range(count)).encode()


def test_a_batch_alone_loads_each_engine_about_once(served: Served, room: Room) -> None:
    with served.client() as client:
        done = ended(client, begin(client, content(60)))
        assert (done.status, done.request_counts.completed) == ("completed", 60)
    assert room.faults == []
    assert sorted(set(room.loads)) == ["a", "b", "c"]
    assert len(room.loads) == 3, "one is there from the start, and is used before it goes"


def test_a_batch_and_online_requests_share_the_slots(served: Served, room: Room) -> None:
    def ask(number: int) -> int:
        body = {"model": MODELS[number % 3], "messages": [{"role": "user", "content": f"{number}?"}]}
        return served.http.post("/v1/chat/completions", json=body).status_code

    with served.client() as client, ThreadPoolExecutor(6) as pool:
        batch = begin(client, content(60))
        statuses, sent = set[int](), 0
        while client.batches.retrieve(batch.id).status not in ENDED:
            statuses |= set(pool.map(ask, range(sent, sent + 12)))
            sent += 12
        done = ended(client, batch)
        assert (done.status, done.request_counts.completed) == ("completed", 60)
        assert {row["custom_id"] for row in rows(client, done.output_file_id)} == {f"q{i}" for i in range(60)}
    assert (room.faults, statuses) == ([], {200})
    assert len(room.loads) < (120 + sent) / 4, "grouped: first come, first served loads for nearly each call"
    assert all(not s.running and not s.announced for s in served.service.dispatcher.snapshot().values())


def test_cancelling_gives_the_slots_back(served: Served, room: Room) -> None:
    with served.client() as client:
        batch = begin(client, content(400))
        while not client.batches.retrieve(batch.id).request_counts.completed:
            assert client.batches.retrieve(batch.id).status not in ENDED
        client.batches.cancel(batch.id)
        assert ended(client, batch).status == "cancelled"
        for model in MODELS:
            body = {"model": model, "messages": [{"role": "user", "content": "?"}]}
            assert served.http.post(CHAT, json=body).status_code == 200
    assert room.faults == []
    assert all(not s.running and not s.announced for s in served.service.dispatcher.snapshot().values())
