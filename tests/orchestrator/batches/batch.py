"""A batch in a folder of its own, run in this process on fake engines."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experts.base import Engine
from experts.fake import FakeEngine
from experts.types import EngineSpec
from orchestrator.batches.runner import Runner
from orchestrator.batches.session import Job, Progress
from orchestrator.batches.start import job_for, open_bench
from orchestrator.config import parse_config
from orchestrator.policies import Overrides

URL = "/v1/chat/completions"


def config(**engines: Mapping[str, Any]) -> dict[str, Any]:
    """Three experts, an engine each; ``engines`` are options by engine id. The router looks at the question: the first
    expert that it names, then the second."""
    ids = ("a", "b", "c")
    names = {"a": "one", "b": "two", "c": "three"}
    return {
        "engines": {e: {"backend": "fake", "options": dict(engines.get(e, {}))} for e in ids},
        "experts": {names[e]: {"engine": e} for e in ids},
        "policies": {
            "default": {"router": "random", "top_k": 2, "aggregator": "vote"},
            "single": {"router": "round_robin"},
        },
        "resilience": {"retries": 0, "breaker_open_s": 0.02},
    }


def line(name: str, *, model: str = "collegium", text: str | None = None, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text or f"What of {name}?"}]
    return {"custom_id": name, "method": "POST", "url": URL, "body": {"model": model, "messages": messages, **body}}


class Batch:
    """``engines`` are those of the last run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.settings = parse_config(settings or config())
        self.engines: dict[str, FakeEngine] = {}
        self.progress: list[Progress] = []

    def write(self, lines: Iterable[Mapping[str, Any] | str | bytes]) -> None:
        with (self.folder / "in.jsonl").open("wb") as file:
            for each in lines:
                raw = (
                    each if isinstance(each, bytes) else (each if isinstance(each, str) else json.dumps(each)).encode()
                )
                file.write(raw + b"\n")

    def job(self, **changes: Any) -> Job:
        given = {"order": "grouped", "window": 8, **changes}
        return job_for(self.folder / "in.jsonl", self.folder / "out.jsonl", **given)

    async def run(
        self,
        *,
        overrides: Overrides | None = None,
        resident: int = 1,
        wrap: Callable[[FakeEngine], Engine] = lambda engine: engine,
        **changes: Any,
    ) -> Mapping[str, Any]:
        def make(spec: EngineSpec) -> Engine:
            self.engines[spec.engine_id] = FakeEngine(spec)
            return wrap(self.engines[spec.engine_id])

        async with open_bench(self.settings, overrides=overrides, resident=resident, make=make) as bench:
            return await Runner(self.job(**changes), lambda: bench, watch=self.progress.append).run()

    def rows(self, name: str = "out.jsonl") -> list[dict[str, Any]]:
        path = self.folder / name
        return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []

    @property
    def errors(self) -> list[dict[str, Any]]:
        return self.rows("out.errors.jsonl")

    def answers(self) -> dict[str, str]:
        """Text by custom_id."""
        return {r["custom_id"]: r["response"]["body"]["choices"][0]["message"]["content"] for r in self.rows()}

    @property
    def asked(self) -> int:
        """Calls that the last run's engines were asked."""
        return sum(engine.calls for engine in self.engines.values())
