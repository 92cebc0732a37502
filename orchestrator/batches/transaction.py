"""SQLite, one transaction at a time."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from experts.errors import Unavailable


@contextmanager
def transaction(db: sqlite3.Connection, refused: Callable[[sqlite3.Error], str]) -> Iterator[sqlite3.Connection]:
    """All of the block, or nothing of it. Raises Unavailable, in the words of ``refused``, where SQLite fails."""
    try:
        db.execute("BEGIN IMMEDIATE")
        yield db
        db.execute("COMMIT")
    except sqlite3.Error as exc:
        _roll_back(db)
        raise Unavailable(refused(exc)) from exc
    except BaseException:
        _roll_back(db)
        raise


def _roll_back(db: sqlite3.Connection) -> None:
    """What was asked for has failed already; SQLite itself undoes what cannot be rolled back now, at the next start."""
    with suppress(sqlite3.Error):
        if db.in_transaction:
            db.execute("ROLLBACK")
