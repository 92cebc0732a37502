"""The service's files and batches, in one SQLite file. Each belongs to a tenant, and others do not see it."""

import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from filelock import FileLock, Timeout

from experts.errors import BadRequest, ConfigError, NotFound, RateLimited
from orchestrator.batches.transaction import transaction

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled", "expired"]
UNFINISHED: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, tenant TEXT, purpose TEXT,
    name TEXT, bytes INTEGER, created_at INTEGER, path TEXT);
CREATE TABLE IF NOT EXISTS batches (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, tenant TEXT,
    status TEXT, body BLOB);
CREATE INDEX IF NOT EXISTS files_of ON files (tenant, seq);
CREATE INDEX IF NOT EXISTS batches_of ON batches (tenant, seq);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """``path`` is where it lies."""

    file_id: str
    tenant: str | None
    purpose: str
    name: str
    size_bytes: int
    created_at: int
    path: Path

    def body(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": self.size_bytes,
            "created_at": self.created_at,
            "expires_at": None,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """``body`` is OpenAI's batch object, less its id and status."""

    batch_id: str
    tenant: str | None
    status: Status
    body: Mapping[str, Any]


class Register:
    """Methods block for a moment; call them in a thread. Raises ConfigError when the folder cannot be used, or another
    service keeps its batches there: each would take up what the other is at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        try:
            for part in ("files", "batches"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            self._alone = FileLock(folder / "register.lock", thread_local=False)
            self._alone.acquire(timeout=0)
            for cut_off in (folder / "files").glob("*.part"):
                cut_off.unlink()
            self._db = sqlite3.connect(
                folder / "register.sqlite", timeout=1, check_same_thread=False, isolation_level=None
            )
            self._db.executescript(
                f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; BEGIN IMMEDIATE; {SCHEMA} COMMIT"
            )
        except Timeout as exc:
            raise ConfigError(f"batches.path: another service keeps its batches in {folder}; name another.") from exc
        except (OSError, sqlite3.Error) as exc:
            raise ConfigError(f"batches.path: cannot keep batches in {folder}: {exc}.") from exc

    def close(self) -> None:
        with self._lock:
            self._db.close()
            self._alone.release()

    def place(self) -> tuple[str, Path]:
        """An id and a path for a new file."""
        file_id = f"file-{uuid.uuid4().hex}"
        return file_id, self.folder / "files" / file_id

    def add_file(self, file: StoredFile, *, most: int) -> None:
        """Raises RateLimited where the tenant keeps ``most`` already."""
        with self._transaction() as db:
            query = "SELECT count(*) FROM files WHERE tenant IS ? AND purpose = 'batch'"
            if db.execute(query, (file.tenant,)).fetchone()[0] >= most:
                raise RateLimited(f"You keep {most} files, the most that may be (batches.max_files); delete some.")
            self._add(db, file)

    def file(self, file_id: str, tenant: str | None) -> StoredFile:
        """Raises NotFound."""
        query = f"SELECT {_FILE} FROM files WHERE id = ? AND tenant IS ?"  # noqa: S608  # a constant
        with self._transaction() as db:
            row = db.execute(query, (file_id, tenant)).fetchone()
        if row is None:
            raise NotFound(f"No file '{file_id[:100]}'.", param="file_id")
        return self._stored_file(row)

    def files(self, tenant: str | None, *, purpose: str | None, page: "Page") -> list[StoredFile]:
        """One more than the page's limit, where there are more."""
        where, values = ("AND purpose = ?", (purpose,)) if purpose else ("", ())
        with self._transaction() as db:
            rows = page.read(db, "files", _FILE, tenant, where, values)
        return [self._stored_file(row) for row in rows]

    def remove_file(self, file_id: str, tenant: str | None) -> None:
        """Raises NotFound, and BadRequest while a batch reads it."""
        file = self.file(file_id, tenant)
        with self._transaction() as db:
            for batch in _unfinished(db):
                if batch.body["input_file_id"] == file_id:
                    raise BadRequest(f"Batch '{batch.batch_id}' reads this file; cancel it first.", param="file_id")
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        file.path.unlink(missing_ok=True)

    def add_batch(self, tenant: str | None, body: Mapping[str, Any], *, most: int) -> StoredBatch:
        """Raises RateLimited where the tenant has ``most`` that are not done."""
        batch = StoredBatch(batch_id=f"batch_{uuid.uuid4().hex}", tenant=tenant, status="validating", body=body)
        with self._transaction() as db:
            if sum(each.tenant == tenant for each in _unfinished(db)) >= most:
                raise RateLimited(f"{most} batches of yours are not done (batches.max_unfinished); wait for one.")
            query = "INSERT INTO batches (id, tenant, status, body) VALUES (?, ?, ?, ?)"
            db.execute(query, (batch.batch_id, tenant, batch.status, orjson.dumps(body)))
        return batch

    def batch(self, batch_id: str, tenant: str | None) -> StoredBatch:
        """Raises NotFound."""
        with self._transaction() as db:
            return _find_batch(db, batch_id, tenant)

    def cancel(self, batch_id: str, tenant: str | None) -> tuple[StoredBatch, bool]:
        """The batch, and whether it is being cancelled since now. Raises NotFound, and BadRequest where it has ended
        (in one step with the cancelling: it may end at any moment)."""
        with self._transaction() as db:
            batch = _find_batch(db, batch_id, tenant)
            if batch.status not in UNFINISHED:
                raise BadRequest(f"The batch is {batch.status}; there is nothing left to cancel.", param="batch_id")
            if batch.status == "cancelling":
                return batch, False
            _change(db, batch_id, "cancelling", {"cancelling_at": now()})
            return _find_batch(db, batch_id, tenant), True

    def batches(self, tenant: str | None, *, page: "Page") -> list[StoredBatch]:
        """One more than the page's limit, where there are more."""
        with self._transaction() as db:
            return [_stored_batch(row) for row in page.read(db, "batches", _BATCH, tenant, "", ())]

    def unfinished(self) -> list[StoredBatch]:
        """Of every tenant, the oldest first."""
        with self._transaction() as db:
            return _unfinished(db)

    def change(
        self, batch_id: str, status: Status, changes: Mapping[str, Any], files: Sequence[StoredFile] = ()
    ) -> None:
        """The batch's new status and what else is new of it, together with the files that it wrote."""
        with self._transaction() as db:
            _change(db, batch_id, status, changes)
            for file in files:
                self._add(db, file)

    def _add(self, db: sqlite3.Connection, file: StoredFile) -> None:
        place = str(file.path.relative_to(self.folder))
        values = (file.file_id, file.tenant, file.purpose, file.name, file.size_bytes, file.created_at, place)
        db.execute(f"INSERT INTO files ({_FILE}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)  # noqa: S608

    def _stored_file(self, row: Sequence[Any]) -> StoredFile:
        file_id, tenant, purpose, name, size, created_at, path = row
        return StoredFile(
            file_id=file_id,
            tenant=tenant,
            purpose=purpose,
            name=name,
            size_bytes=size,
            created_at=created_at,
            path=self.folder / path,
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, transaction(self._db, _refused) as db:
            yield db


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A stretch of a list, the newest first unless ``oldest_first``, past the item ``after``."""

    after: str | None = None
    limit: int = 20
    oldest_first: bool = False

    def read(
        self, db: sqlite3.Connection, table: str, columns: str, tenant: str | None, where: str, values: tuple[str, ...]
    ) -> list[Any]:
        """Raises BadRequest where there is no item ``after``."""
        sign, turn = (">", "ASC") if self.oldest_first else ("<", "DESC")
        past: tuple[int, ...] = ()
        if self.after is not None:
            found = db.execute(f"SELECT seq FROM {table} WHERE id = ? AND tenant IS ?", (self.after, tenant)).fetchone()  # noqa: S608
            if found is None:
                raise BadRequest(f"after: there is no '{self.after[:100]}'.", param="after")
            where, past = f"{where} AND seq {sign} ?", found
        query = f"SELECT {columns} FROM {table} WHERE tenant IS ? {where} ORDER BY seq {turn} LIMIT ?"  # noqa: S608
        return db.execute(query, (tenant, *values, *past, self.limit + 1)).fetchall()


_FILE = "id, tenant, purpose, name, bytes, created_at, path"
_BATCH = "id, tenant, status, body"


def _refused(exc: sqlite3.Error) -> str:
    return f"The register of files and batches cannot be used: {exc}."


def now() -> int:
    return int(time.time())


def _unfinished(db: sqlite3.Connection) -> list[StoredBatch]:
    marks = ", ".join("?" for _ in UNFINISHED)
    query = f"SELECT {_BATCH} FROM batches WHERE status IN ({marks}) ORDER BY seq"  # noqa: S608
    return [_stored_batch(row) for row in db.execute(query, UNFINISHED)]


def _find_batch(db: sqlite3.Connection, batch_id: str, tenant: str | None) -> StoredBatch:
    query = f"SELECT {_BATCH} FROM batches WHERE id = ? AND tenant IS ?"  # noqa: S608
    row = db.execute(query, (batch_id, tenant)).fetchone()
    if row is None:
        raise NotFound(f"No batch '{batch_id[:100]}'.", param="batch_id")
    return _stored_batch(row)


def _change(db: sqlite3.Connection, batch_id: str, status: Status, changes: Mapping[str, Any]) -> None:
    (body,) = db.execute("SELECT body FROM batches WHERE id = ?", (batch_id,)).fetchone()
    body = orjson.dumps({**orjson.loads(body), **changes})
    db.execute("UPDATE batches SET status = ?, body = ? WHERE id = ?", (status, body, batch_id))


def _stored_batch(row: Sequence[Any]) -> StoredBatch:
    batch_id, tenant, status, body = row
    return StoredBatch(batch_id=batch_id, tenant=tenant, status=status, body=orjson.loads(body))
