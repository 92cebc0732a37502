"""The input file: read line by line, and again at an offset. It is never copied."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experts.errors import ConfigError

PIECE = 2**20
MARK = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which some editors and spreadsheets put before the first line: no part of it."""
FOREIGN = {b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"\x1f\x8b": "compressed by gzip"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where line ``n`` (from 1, blank ones counted too) lies. ``too_large``: longer than the limit, and not kept."""

    n: int
    offset: int
    size_bytes: int
    too_large: bool = False


class Source:
    """Raises ConfigError when the file cannot be read, or is none of lines in UTF-8 from its first bytes on."""

    def __init__(self, path: Path, *, max_line_bytes: int) -> None:
        self.path = path
        self._max_line_bytes = max_line_bytes
        try:
            self._file = path.open("rb")
        except OSError as exc:
            raise ConfigError(f"Cannot read {path}: {exc.strerror}.") from exc
        self.size_bytes = os.fstat(self._file.fileno()).st_size
        if (what := FOREIGN.get(self.read(0, 2))) is not None:
            self.close()
            raise ConfigError(f"The input is {what}; a batch reads JSON lines in UTF-8. Convert it first.")

    def digest(self) -> str:
        """SHA-256 of the whole file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Safe to call from any thread."""
        return os.pread(self._file.fileno(), size_bytes, offset)

    def lines(self, *, n: int = 0, offset: int = 0) -> Iterator[tuple[Place, bytes]]:
        """The lines after line ``n``, which ends at ``offset``; blank ones are left out."""
        if offset == 0 and self.read(0, len(MARK)) == MARK:
            offset = len(MARK)
        self._file.seek(offset)
        while raw := self._file.readline(self._max_line_bytes + 1):
            n += 1
            size = len(raw)
            too_large = size > self._max_line_bytes and not raw.endswith(b"\n")
            if too_large:
                size += self._skip_line()
                raw = b""
            if too_large or raw.strip():
                yield Place(n=n, offset=offset, size_bytes=size, too_large=too_large), raw
            offset += size

    def close(self) -> None:
        self._file.close()

    def _skip_line(self) -> int:
        skipped = 0
        while piece := self._file.readline(PIECE):
            skipped += len(piece)
            if piece.endswith(b"\n"):
                break
        return skipped
