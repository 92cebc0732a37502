"""The output files: each is written beside its place, made safe on the disk, and put there in one step."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from experts.errors import ConfigError, Unavailable

SPARE_BYTES = 16 * 2**20


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises ConfigError where nothing can be written, before any work is done for it."""
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder} to write to; make it, or name another with --out.")
    probe = folder / f".collegium-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(b"\0" * 65536)
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        raise ConfigError(f"Cannot write to {folder}: {exc.strerror}. Name another place with --out.") from exc
    finally:
        _unlink(probe)
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if free < needed_bytes + SPARE_BYTES:
        raise ConfigError(
            f"{folder} has {free / 1e6:.0f} MB free; a batch of this size needs about "
            f"{(needed_bytes + SPARE_BYTES) / 1e6:.0f} MB. Make room, or name another place with --out."
        )


def write_rows(path: Path, rows: Iterable[tuple[int, bytes]]) -> tuple[int, int]:
    """A line each. How many, and how many of them came out of turn: the same line again."""
    count = repeated = last = 0
    with whole(path) as file:
        for n, row in rows:
            file.write(row + b"\n")
            count += 1
            repeated += n <= last
            last = n
    return count, repeated


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well, and leaves no trace when it does not. Raises
    Unavailable when the disk refuses."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb", buffering=2**20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as exc:
        _unlink(part)
        raise Unavailable(f"Cannot write {path}: {exc.strerror}. Make room, then go on (--resume).") from exc
    except BaseException:
        _unlink(part)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a folder that takes nothing has nothing to take away
