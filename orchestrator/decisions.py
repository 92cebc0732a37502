"""Decisions kept for reading back: the last ``keep`` ones, in memory or in a SQLite file."""

import queue
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import orjson

from experts.errors import ConfigError
from orchestrator.replies import explanation
from orchestrator.resilience import CallRecord
from orchestrator.run import Run


class Shelf(Protocol):
    """Keeps rows by request id. A row is the tenant and the explanation as JSON: no text of question or answer."""

    def put(self, request_id: str, tenant: str | None, row: bytes) -> None: ...

    def get(self, request_id: str) -> tuple[str | None, bytes] | None: ...

    def close(self) -> None: ...


class MemoryShelf:
    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._rows: OrderedDict[str, tuple[str | None, bytes]] = OrderedDict()

    def put(self, request_id: str, tenant: str | None, row: bytes) -> None:
        self._rows[request_id] = (tenant, row)
        if len(self._rows) > self._keep:
            self._rows.popitem(last=False)

    def get(self, request_id: str) -> tuple[str | None, bytes] | None:
        return self._rows.get(request_id)

    def close(self) -> None:
        self._rows.clear()


class SqliteShelf:
    """A file in WAL mode, written behind by one thread in batches, so that no request waits for the disk.

    A row can be read as soon as put() returns. When the disk refuses a batch it is dropped and ``on_error`` is told:
    a full disk must not stop the service. Raises ConfigError when the file cannot be opened.
    """

    BATCH_S = 0.2
    BACKLOG = 50_000

    def __init__(self, path: Path, keep: int, on_error: Callable[[str], None]) -> None:
        self._path = path
        self._keep = keep
        self._on_error = on_error
        self._fresh: dict[str, tuple[str | None, bytes]] = {}
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        try:
            with self._open() as db:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute(
                    "CREATE TABLE IF NOT EXISTS decisions"
                    " (n INTEGER PRIMARY KEY, request_id TEXT UNIQUE, tenant TEXT, row BLOB)"
                )
        except (sqlite3.Error, OSError) as exc:
            raise ConfigError(f"decisions.path: cannot write {path}: {exc}.") from exc
        self._thread = threading.Thread(target=self._write_behind, name="decisions", daemon=True)
        self._thread.start()

    def put(self, request_id: str, tenant: str | None, row: bytes) -> None:
        if len(self._fresh) >= self.BACKLOG:
            self._on_error("the decision store is behind; a decision was dropped")
            return
        self._fresh[request_id] = (tenant, row)
        self._queue.put(request_id)

    def get(self, request_id: str) -> tuple[str | None, bytes] | None:
        if (fresh := self._fresh.get(request_id)) is not None:
            return fresh
        with self._open() as db:
            found = db.execute("SELECT tenant, row FROM decisions WHERE request_id = ?", (request_id,)).fetchone()
        return None if found is None else (found[0], found[1])

    def close(self) -> None:
        """Writes what is left."""
        self._queue.put(None)
        self._thread.join()

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=5)

    def _write_behind(self) -> None:
        db, open_ = self._open(), True
        while open_:
            batch = [self._queue.get()]
            while len(batch) < 1000 and not (batch[-1] is None or self._queue.empty()):
                batch.append(self._queue.get())
            open_ = batch[-1] is not None
            self._write(db, [b for b in batch if b is not None])
        db.close()

    def _write(self, db: sqlite3.Connection, ids: list[str]) -> None:
        rows = [(i, *self._fresh[i]) for i in ids]
        try:
            with db:
                db.executemany("INSERT OR REPLACE INTO decisions (request_id, tenant, row) VALUES (?, ?, ?)", rows)
                db.execute("DELETE FROM decisions WHERE n <= (SELECT max(n) FROM decisions) - ?", (self._keep,))
        except sqlite3.Error as exc:
            self._on_error(f"the decision store lost {len(rows)} rows: {exc}")
        for i in ids:
            self._fresh.pop(i, None)


class DecisionLog:
    """The Observer that files every run on a shelf when it ends."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def routed(self, run: Run) -> None:
        """Filed when it ends."""

    def called(self, run: Run, call: CallRecord) -> None:
        """Filed when the run ends."""

    def ended(self, run: Run) -> None:
        row = orjson.dumps(explanation(run), default=str)
        self._shelf.put(run.request.request_id, run.request.tenant, row)

    def read(self, request_id: str, tenant: str | None) -> Any:
        """The explanation, or None when it is not there (any more) or is another tenant's."""
        found = self._shelf.get(request_id)
        return None if found is None or found[0] != tenant else orjson.loads(found[1])

    def close(self) -> None:
        self._shelf.close()
