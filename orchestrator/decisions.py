"""Decisions kept for reading back: the last ``keep`` ones, in memory or in a SQLite file."""

import asyncio
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import orjson

from experts.errors import ConfigError, Unavailable
from orchestrator.replies import explanation, to_json
from orchestrator.resilience import CallRecord
from orchestrator.run import Run

Row = tuple[str | None, bytes]
"""The tenant, and the explanation as JSON: no text of question or answer."""


class Shelf(Protocol):
    """Keeps rows by request id. A row can be read as soon as put() returns."""

    def put(self, request_id: str, row: Row) -> None: ...

    async def get(self, request_id: str) -> Row | None: ...

    def close(self) -> None: ...


class MemoryShelf:
    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def put(self, request_id: str, row: Row) -> None:
        self._rows[request_id] = row
        if len(self._rows) > self._keep:
            self._rows.popitem(last=False)

    async def get(self, request_id: str) -> Row | None:
        return self._rows.get(request_id)

    def close(self) -> None:
        self._rows.clear()


class SqliteShelf:
    """A file in WAL mode, written behind by one thread in batches, so that no request waits for the disk.

    When the disk refuses a batch it is dropped and ``on_error`` is told: a full disk must not stop the service. A
    process that is killed loses the last ``BATCH_S`` at most. Raises ConfigError when the file cannot be used.
    """

    BATCH_S = 0.2
    BACKLOG = 10_000
    TELL_EVERY_S = 60.0

    def __init__(self, path: Path, keep: int, on_error: Callable[[str], None]) -> None:
        self._path = path
        self._keep = keep
        self._on_error = on_error
        self._lock = threading.Lock()
        self._fresh: dict[str, Row] = {}
        self._writing: Mapping[str, Row] = {}
        self._dropped = 0
        self._quiet_until_s = 0.0
        self._closing = threading.Event()
        self._db = self._prepare()
        self._thread = threading.Thread(target=self._write_behind, name="decisions", daemon=True)
        self._thread.start()

    def put(self, request_id: str, row: Row) -> None:
        with self._lock:
            if len(self._fresh) < self.BACKLOG:
                self._fresh[request_id] = row
            else:
                self._dropped += 1

    async def get(self, request_id: str) -> Row | None:
        row = self._fresh.get(request_id) or self._writing.get(request_id)
        # The file is read in a thread: another process may hold it for a while.
        return row or await asyncio.to_thread(self._find, request_id)

    def close(self) -> None:
        """Writes what is left."""
        self._closing.set()
        self._thread.join()
        self._db.close()

    def _prepare(self) -> sqlite3.Connection:
        try:
            db = self._open()
            # WAL with NORMAL outlives a killed process; only a power cut takes the last rows.
            db.executescript(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
                "CREATE TABLE IF NOT EXISTS decisions"
                " (n INTEGER PRIMARY KEY, request_id TEXT UNIQUE, tenant TEXT, row BLOB);"
                "BEGIN IMMEDIATE; SELECT n, request_id, tenant, row FROM decisions LIMIT 0; COMMIT"
            )
        except sqlite3.Error as exc:
            raise ConfigError(f"decisions.path: cannot use {self._path} as SQLite file: {exc}.") from exc
        return db

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=5, check_same_thread=False)

    def _find(self, request_id: str) -> Row | None:
        try:
            with closing(self._open()) as db:
                found = db.execute("SELECT tenant, row FROM decisions WHERE request_id = ?", (request_id,)).fetchone()
        except sqlite3.Error as exc:
            raise Unavailable(f"The decision store cannot be read: {exc}.") from exc
        return None if found is None else (found[0], found[1])

    def _write_behind(self) -> None:
        while not self._closing.wait(self.BATCH_S):
            self._write()
        self._write()

    def _write(self) -> None:
        with self._lock:
            self._writing, self._fresh = self._fresh, {}
            dropped, self._dropped = self._dropped, 0
        reason = "the disk is behind"
        try:
            self._insert(self._writing)
        except sqlite3.Error as exc:
            dropped, reason = dropped + len(self._writing), str(exc)
        self._writing = {}
        if dropped and time.monotonic() >= self._quiet_until_s:
            self._quiet_until_s = time.monotonic() + self.TELL_EVERY_S
            self._on_error(f"the decision store {self._path} drops decisions ({dropped} just now): {reason}")

    def _insert(self, rows: Mapping[str, Row]) -> None:
        if not rows:
            return
        values = [(request_id, *row) for request_id, row in rows.items()]
        with self._db as db:
            db.executemany("INSERT OR REPLACE INTO decisions (request_id, tenant, row) VALUES (?, ?, ?)", values)
            db.execute("DELETE FROM decisions WHERE n <= (SELECT max(n) FROM decisions) - ?", (self._keep,))


class DecisionLog:
    """The Observer that files every run on a shelf when it ends."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def routed(self, run: Run) -> None:
        """Filed when it ends."""

    def called(self, run: Run, call: CallRecord) -> None:
        """Filed when the run ends."""

    def ended(self, run: Run) -> None:
        # A copy, for orjson's own bytes keep the 4 KB that they were written in.
        row = bytes(memoryview(to_json(explanation(run))))
        self._shelf.put(run.request.request_id, (run.request.tenant, row))

    async def read(self, request_id: str, tenant: str | None) -> Any:
        """The explanation, or None when it is not there (any more) or is another tenant's.

        Raises Unavailable when the store cannot be read.
        """
        found = await self._shelf.get(request_id)
        return None if found is None or found[0] != tenant else orjson.loads(found[1])

    def close(self) -> None:
        self._shelf.close()
