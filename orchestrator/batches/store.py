"""What a batch knows of itself, in one SQLite file: a process that is killed loses what was under way, nothing else.

Every method is one transaction. One process at a time holds the file; methods may be called from any thread, one at a
time. A call has a row in ``calls`` while its line is open; a line is settled when it has a row in ``results``.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from experts.errors import ConfigError, Unavailable
from orchestrator.batches.source import Place
from orchestrator.batches.transaction import transaction

VERSION = "1"
PENDING, ANSWERED, FAILED = 0, 1, 2

SCHEMA = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ids (custom_id BLOB PRIMARY KEY, n INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lines
    (n INTEGER PRIMARY KEY, start INTEGER, size INTEGER, width INTEGER, open INTEGER, decision BLOB);
CREATE TABLE IF NOT EXISTS calls
    (n INTEGER, slot INTEGER, engine TEXT, expert TEXT, state INTEGER, said BLOB, PRIMARY KEY (n, slot)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS pending ON calls (engine, n, slot) WHERE state = 0;
CREATE TABLE IF NOT EXISTS results (n INTEGER PRIMARY KEY, ok INTEGER, row BLOB);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A line that is to be asked: its decision, and (engine_id, expert_id) of each choice."""

    place: Place
    decision: bytes
    choices: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The one row that a line becomes, of the output (``ok``) or the error file."""

    n: int
    ok: bool
    row: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One expert to be asked for one line. ``width``: how many experts its decision chose."""

    n: int
    slot: int
    expert_id: str
    offset: int
    size_bytes: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """How a call ended: an answer, or a failure and the (engine_id, expert_id) that may stand in, best first, as long
    as the line has asked less than ``max_calls``."""

    n: int
    slot: int
    ok: bool
    said: bytes
    may_fall_back: bool = False
    spares: tuple[tuple[str, str], ...] = ()
    max_calls: int = 0


class Store:
    """Raises ConfigError when the file cannot be used, Unavailable when the disk refuses a write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path.with_name(f"{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as exc:
            raise ConfigError(f"Another process works on this batch: it holds {path}.") from exc
        except OSError as exc:
            raise ConfigError(_unusable(path, exc)) from exc
        try:
            self._db = sqlite3.connect(path, timeout=1, check_same_thread=False, isolation_level=None)
            self._db.executescript(
                # WAL with NORMAL outlives a killed process; a power cut takes the last moments, which are done again.
                "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
                "PRAGMA cache_size=-32768; PRAGMA temp_store=FILE; PRAGMA wal_autocheckpoint=2000;"
                f"BEGIN EXCLUSIVE; {SCHEMA} COMMIT"
            )
        except sqlite3.Error as exc:
            if hasattr(self, "_db"):
                self._db.close()  # open, it would keep the next try out
            self._lock.release()
            full = exc.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
            raise (Unavailable if full else ConfigError)(_unusable(path, exc)) from exc

    def close(self) -> None:
        self._db.close()
        self._lock.release()

    def remove(self) -> None:
        """The batch is over, and what it made lies elsewhere."""
        self.close()
        for suffix in ("", "-wal", "-shm", ".lock"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def about(self) -> dict[str, str]:
        with self._transaction() as db:
            return dict(db.execute("SELECT key, value FROM about"))

    def note(self, facts: Mapping[str, str]) -> None:
        with self._transaction() as db:
            _note(db, facts)

    def plan(
        self,
        plans: Sequence[Plan],
        settled: Sequence[Result],
        claims: Sequence[tuple[bytes, int]],
        twice: Callable[[int], Result],
        facts: Mapping[str, str],
    ) -> tuple[int, int]:
        """Files what was planned of a stretch of lines. How many of them got their row by it, and how many of those go
        to the error file. ``settled`` are the rows of lines that need no call.

        ``claims`` are the (digest of custom_id, n) of all of them; a line whose id an earlier one has gets the row that
        ``twice`` makes.
        """
        with self._transaction() as db:
            again = {n for digest, n in claims if not _claim(db, digest, n)}
            again &= {p.place.n for p in plans} | {r.n for r in settled if r.ok}  # a bad line keeps its own mistake
            fresh = [p for p in plans if p.place.n not in again]
            settled = [*(r for r in settled if r.n not in again), *map(twice, sorted(again))]
            db.executemany("INSERT INTO lines VALUES (?, ?, ?, ?, ?, ?)", map(_line, fresh))
            db.executemany("INSERT INTO calls VALUES (?, ?, ?, ?, 0, NULL)", _calls(fresh))
            _settle(db, settled)
            _note(db, facts)
        return len(settled), sum(not result.ok for result in settled)

    def engines(self) -> dict[str, int]:
        """Calls that are to be made, by engine."""
        with self._transaction() as db:
            return dict(
                db.execute("SELECT engine, count(*) FROM calls WHERE state = 0 GROUP BY engine ORDER BY 2 DESC")
            )

    def pending(self, engine_id: str, *, after: tuple[int, int], limit: int) -> list[Call]:
        """Calls to be made of one engine, in the order of lines, past the (n, slot) of ``after``."""
        found = "SELECT c.n, slot, expert, start, size, width FROM calls c JOIN lines l ON l.n = c.n"
        where = "WHERE state = 0 AND engine = ? AND (c.n, slot) > (?, ?) ORDER BY c.n, slot LIMIT ?"
        with self._transaction() as db:
            return [_call(row) for row in db.execute(f"{found} {where}", (engine_id, *after, limit))]

    def arrived(self, *, after: tuple[int, int], limit: int) -> list[Call]:
        """Calls to be made of all engines, in the order of lines and of their decisions."""
        found = "SELECT c.n, slot, expert, start, size, width FROM calls c JOIN lines l ON l.n = c.n"
        where = "WHERE state = 0 AND (c.n, slot) > (?, ?) ORDER BY c.n, slot LIMIT ?"
        with self._transaction() as db:
            return [_call(row) for row in db.execute(f"{found} {where}", (*after, limit))]

    def settle(self, said: Sequence[Said], results: Sequence[Result], facts: Mapping[str, str]) -> list[Said]:
        """Files how calls ended, and the rows of lines that are done. Gives back the calls that were their lines'
        last."""
        with self._transaction() as db:
            whole = [each for each in said if _hear(db, each)]
            _settle(db, results)
            _note(db, facts)
        return whole

    def whole(self, *, after: int, limit: int) -> list[int]:
        """Lines past ``after`` whose calls have ended and that have no row yet."""
        query = "SELECT n FROM lines WHERE open = 0 AND n > ? ORDER BY n LIMIT ?"
        with self._transaction() as db:
            return [n for (n,) in db.execute(query, (after, limit))]

    def line(self, n: int) -> tuple[int, int, bytes, list[tuple[bool, str, bytes]]]:
        """Where line ``n`` lies (offset, size), its decision, and what its calls said: (ok, expert_id, said)."""
        with self._transaction() as db:
            start, size, decision = db.execute("SELECT start, size, decision FROM lines WHERE n = ?", (n,)).fetchone()
            heard = db.execute("SELECT state, expert, said FROM calls WHERE n = ? AND state > 0 ORDER BY slot", (n,))
            return start, size, decision, [(state == ANSWERED, expert, said) for state, expert, said in heard]

    def open_lines(self, *, after: int, limit: int) -> list[tuple[int, int, int]]:
        """(n, offset, size) of lines past ``after`` that have no row yet."""
        query = "SELECT n, start, size FROM lines WHERE open >= 0 AND n > ? ORDER BY n LIMIT ?"
        with self._transaction() as db:
            return list(db.execute(query, (after, limit)))

    def counts(self) -> tuple[int, int]:
        """Lines that have their row, and those of them that go to the error file."""
        with self._transaction() as db:
            settled, ok = db.execute("SELECT count(*), coalesce(sum(ok), 0) FROM results").fetchone()
            return settled, settled - ok

    def rows(self, *, ok: bool) -> Iterator[tuple[int, bytes]]:
        """(n, row) in the order of the input's lines."""
        last = 0
        query = "SELECT n, row FROM results WHERE ok = ? AND n > ? ORDER BY n LIMIT 500"
        while page := self._page(query, (ok, last)):
            yield from page
            last = page[-1][0]

    def _page(self, query: str, values: tuple[object, ...]) -> list[tuple[int, bytes]]:
        with self._transaction() as db:
            return db.execute(query, values).fetchall()

    def _transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self._db, lambda exc: _refused(self.path, exc))


def _claim(db: sqlite3.Connection, digest: bytes, n: int) -> bool:
    """Whether the line is the first with its custom_id."""
    return db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (digest, n)).rowcount == 1


def _line(plan: Plan) -> tuple[object, ...]:
    place, width = plan.place, len(plan.choices)
    return place.n, place.offset, place.size_bytes, width, width, plan.decision


def _calls(plans: Sequence[Plan]) -> Iterator[tuple[object, ...]]:
    for plan in plans:
        for slot, (engine_id, expert_id) in enumerate(plan.choices):
            yield plan.place.n, slot, engine_id, expert_id


def _call(row: tuple[int, int, str, int, int, int]) -> Call:
    n, slot, expert_id, offset, size_bytes, width = row
    return Call(n=n, slot=slot, expert_id=expert_id, offset=offset, size_bytes=size_bytes, width=width)


def _hear(db: sqlite3.Connection, said: Said) -> bool:
    """Whether this was the line's last call."""
    state = ANSWERED if said.ok else FAILED
    changed = db.execute(
        "UPDATE calls SET state = ?, said = ? WHERE n = ? AND slot = ? AND state = 0",
        (state, said.said, said.n, said.slot),
    )
    if changed.rowcount == 0 or (not said.ok and _stand_in(db, said)):
        return False
    (left,) = db.execute("UPDATE lines SET open = open - 1 WHERE n = ? RETURNING open", (said.n,)).fetchone()
    return bool(left == 0)


def _stand_in(db: sqlite3.Connection, said: Said) -> bool:
    """Whether a spare is asked in a failed one's place: the best that the line has not asked."""
    asked = [expert for (expert,) in db.execute("SELECT expert FROM calls WHERE n = ?", (said.n,))]
    fresh = [spare for spare in said.spares if spare[1] not in asked]
    if not fresh or len(asked) >= said.max_calls:
        return False
    db.execute("INSERT INTO calls VALUES (?, ?, ?, ?, 0, NULL)", (said.n, len(asked), *fresh[0]))
    return True


def _settle(db: sqlite3.Connection, results: Sequence[Result]) -> None:
    """A line that has its row keeps it, and needs its calls no more."""
    db.executemany("INSERT OR IGNORE INTO results VALUES (?, ?, ?)", ((r.n, r.ok, r.row) for r in results))
    db.executemany("DELETE FROM calls WHERE n = ?", ((r.n,) for r in results))
    db.executemany("UPDATE lines SET open = -1, decision = NULL WHERE n = ?", ((r.n,) for r in results))


def _note(db: sqlite3.Connection, facts: Mapping[str, str]) -> None:
    db.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", facts.items())


def _unusable(path: Path, exc: Exception) -> str:
    return f"Cannot keep the batch's state in {path}: {exc}. Its folder must be there, writable, and have room."


def _refused(path: Path, exc: sqlite3.Error) -> str:
    return (
        f"The batch's state cannot be written to {path}: {exc}. What was written is safe: make room, then run the "
        "same command with --resume."
    )
