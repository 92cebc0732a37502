"""A file on its way in: multipart/form-data, straight to its place on the disk, never whole in memory."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request as HttpRequest

from experts.errors import BadRequest, TooLarge, Unavailable
from orchestrator.batches.output import whole
from orchestrator.client import stream_body

log = logging.getLogger(__name__)

FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
"""Expiry is accepted for compatibility; a file stays until it is deleted."""
FIELD_BYTES, HEADER_BYTES, PARTS = 1024, 4096, 8
OVERHEAD_BYTES = 64 * 1024
"""What a form has beside its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    name: str
    purpose: str
    size_bytes: int


async def take_upload(http: HttpRequest, path: Path, *, max_bytes: int, stall_s: float) -> Upload:
    """Puts the form's file to ``path``, whole or not at all.

    Raises TooLarge, SlowBody, BadRequest, and Unavailable when the disk is full.
    """
    body = stream_body(http, max_bytes=max_bytes + OVERHEAD_BYTES, stall_s=stall_s)
    try:
        with whole(path) as file:
            form = Form(_boundary(http), file)
            await _feed(form, body)
            return form.close()
    except TooLarge as exc:
        raise TooLarge(f"A file may have at most {max_bytes} bytes here (batches.max_file_bytes); split it.") from exc
    except Unavailable as exc:
        log.error("an upload failed: %s", exc.message)
        raise Unavailable("The service cannot store the file now; its disk is full or fails.") from exc


async def _feed(form: "Form", body: AsyncIterator[bytes]) -> None:
    async for part in body:
        try:
            # In a thread: it writes to the disk.
            await asyncio.to_thread(form.feed, part)
        except FormParserError as exc:
            raise BadRequest(f"The form cannot be read: {exc}.") from exc


def _boundary(http: HttpRequest) -> bytes:
    kind, options = parse_options_header(http.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 256:
        raise BadRequest("A file comes as multipart/form-data with the fields 'file' and 'purpose'.")
    return boundary


@dataclass(slots=True)
class _Part:
    """A part of the form under way: its headers, then its value; a file's value goes to the disk."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    header: bytearray = field(default_factory=bytearray)
    words: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    name: str = ""
    filename: str | None = None


class Form:
    """Reads a form piece by piece. Its only file goes into ``file``."""

    def __init__(self, boundary: bytes, file: BinaryIO) -> None:
        self._file = file
        self._fields: dict[str, str] = {}
        self._name: str | None = None
        self._size = 0
        self._parts = 0
        self._ended = False
        self._part = _Part()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def feed(self, piece: bytes) -> None:
        """Raises FormParserError, BadRequest, or OSError from the disk."""
        self._parser.write(piece)

    def close(self) -> Upload:
        """Raises BadRequest for a form that was cut off or is not what it should be."""
        if not self._ended:
            raise BadRequest("The form ends in the middle.")
        if self._name is None:
            raise BadRequest("The form needs a field 'file' that is a file.", param="file")
        purpose = self._fields.get("purpose")
        if purpose != "batch":
            raise BadRequest("purpose: only 'batch' is served here.", param="purpose")
        return Upload(name=self._name, purpose=purpose, size_bytes=self._size)

    def _begin(self) -> None:
        self._part = _Part()
        self._parts += 1
        if self._parts > PARTS:
            raise BadRequest(f"A form has at most {PARTS} fields.")

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._add(self._part.header, data[start:end], HEADER_BYTES)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._add(self._part.words, data[start:end], HEADER_BYTES)

    def _header_end(self) -> None:
        part = self._part
        part.headers[bytes(part.header).lower()] = bytes(part.words)
        part.header, part.words = bytearray(), bytearray()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._part.headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name not in ("file", *FIELDS):
            raise BadRequest(f"Unknown field '{name[:100]}'; a form has {', '.join(('file', *FIELDS))}.")
        if name in self._fields or (name == "file" and self._name is not None):
            raise BadRequest(f"The field '{name}' stands twice.", param=name)
        self._part.name = name
        if name == "file":
            if b"filename" not in options:
                raise BadRequest("The field 'file' must be a file.", param="file")
            self._name = options[b"filename"].decode("utf-8", "replace")[:255] or "file"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.name == "file":
            self._size += self._file.write(data[start:end])
        else:
            self._add(self._part.value, data[start:end], FIELD_BYTES)

    def _end(self) -> None:
        if self._part.name != "file":
            self._fields[self._part.name] = self._part.value.decode("utf-8", "replace")

    def _finish(self) -> None:
        self._ended = True

    @staticmethod
    def _add(to: bytearray, more: bytes, most: int) -> None:
        to += more
        if len(to) > most:
            raise BadRequest("A field of the form is too long.")
