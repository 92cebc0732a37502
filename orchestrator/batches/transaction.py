"""SQLite, one transaction at a time."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from experts.errors import Unavailable


@contextmanager
def transaction(db: sqlite3.Connection, refused: Callable[[sqlite3.Error], str]) -> Iterator[sqlite3.Connection]:
    """All of the block, or nothing of it. Raises Unavailable, in the words of ``refused``, where SQLite fails."""
    try:
        db.execute("BEGIN IMMEDIATE")
        yield db
        db.execute("COMMIT")
    except BaseException as exc:
        if db.in_transaction:
            db.execute("ROLLBACK")
        if isinstance(exc, sqlite3.Error):
            raise Unavailable(refused(exc)) from exc
        raise
