"""Answers that were had already, on disk: an evaluation that was ended goes on where it stood, and asks nothing twice.

An answer's key is all that it depends on: the engine with its options, the adapter, the prompt as the engine saw it,
and the sampling parameters. A change of any of these is a new question.
"""

import sqlite3
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from experts.errors import ConfigError
from experts.types import Completion, EngineSpec, ExpertSpec, Request, SamplingParams, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """``seconds``: how long the call took when it was made."""

    text: str
    finish_reason: str
    usage: Usage
    seconds: float


class Answers:
    """Raises ConfigError where the file cannot be opened or written."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, expert TEXT, text TEXT, finish TEXT, "
                "prompt_tokens INTEGER, completion_tokens INTEGER, seconds REAL) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as exc:
            raise ConfigError(f"Cannot keep answers in {path}: {exc}. Choose another --out.") from exc

    def __len__(self) -> int:
        count: int = self._db.execute("SELECT count(*) FROM answers").fetchone()[0]
        return count

    def get(self, key: bytes) -> Answer | None:
        row = self._db.execute(
            "SELECT text, finish, prompt_tokens, completion_tokens, seconds FROM answers WHERE key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        text, finish, prompt, completion, seconds = row
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
        return Answer(text=text, finish_reason=finish, usage=usage, seconds=seconds)

    def put(self, key: bytes, expert_id: str, answer: Completion) -> None:
        usage = answer.usage
        row = (key, expert_id, answer.text, answer.finish_reason, usage.prompt_tokens, usage.completion_tokens)
        try:
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, answer.latency_s))
        except sqlite3.Error as exc:
            raise ConfigError(f"Cannot keep an answer: {exc}. Make room, then run the same command again.") from exc

    def close(self) -> None:
        self._db.close()


def key_of(engine: EngineSpec, expert: ExpertSpec, request: Request) -> bytes:
    asked = {
        "engine": [engine.backend, engine.model, dict(engine.options)],
        "adapter": expert.adapter or (expert.expert_id if engine.backend in ("recorded", "fake") else None),
        "question": request.metadata.get("question_id") if engine.backend == "recorded" else None,
        "messages": [asdict(message) for message in request.messages],
        "prompt": request.prompt,
        "params": _params(request.params),
        "format": request.response_format,
        "tools": request.tools,
    }
    return blake2b(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS, default=list), digest_size=16).digest()


def _params(params: SamplingParams) -> dict[str, Any]:
    """Without ``more`` where it is not set: answers that were kept before there was one are still found."""
    found = asdict(params)
    return found if params.more else {key: value for key, value in found.items() if key != "more"}
