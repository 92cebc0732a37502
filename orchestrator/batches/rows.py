"""The one output line that an input line becomes, in OpenAI's batch format.

An answer has ``response``; a failure has that too (its status and OpenAI's error object), and under ``error`` the code
in short with the number of the line in the input file.
"""

from hashlib import blake2b
from typing import Any

from experts.errors import CollegiumError
from orchestrator.batches.store import Result
from orchestrator.replies import error_body, to_json

BREAKS = tuple((chr(code).encode(), b"\\u%04x" % code) for code in (0x85, 0x2028, 0x2029))


class Rows:
    """Rows of one batch. Ids come from the batch's ``key`` and the line: asked again, a line keeps them."""

    def __init__(self, key: str) -> None:
        self._key = key

    def request_id(self, n: int) -> str:
        return f"req_{self._hash(n)}"

    def answer(self, n: int, custom_id: str, body: Any) -> Result:
        return self._row(n, custom_id, status=200, body=body, error=None)

    def failure(self, n: int, custom_id: str | None, exc: CollegiumError) -> Result:
        error = {"code": exc.code, "message": exc.message, "param": exc.param, "line": n}
        return self._row(n, custom_id, status=exc.status, body=error_body(exc), error=error)

    def unasked(self, n: int, custom_id: str | None, code: str, message: str) -> Result:
        """For a line that nobody was asked: the batch ended first."""
        error = {"code": code, "message": message, "param": None, "line": n}
        row = {"id": f"batch_req_{self._hash(n)}", "custom_id": custom_id, "response": None, "error": error}
        return Result(n=n, ok=False, row=_one_line(row))

    def _row(self, n: int, custom_id: str | None, *, status: int, body: Any, error: Any) -> Result:
        row = {
            "id": f"batch_req_{self._hash(n)}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": self.request_id(n), "body": body},
            "error": error,
        }
        return Result(n=n, ok=error is None, row=_one_line(row))

    def _hash(self, n: int) -> str:
        return blake2b(f"{self._key}/{n}".encode(), digest_size=12).hexdigest()


def _one_line(row: Any) -> bytes:
    """JSON without the characters at which Python's ``splitlines`` and httpx's ``iter_lines`` break lines beside the
    newline. They are legal in JSON, and models write them."""
    raw = to_json(row)
    for character, escaped in BREAKS:
        raw = raw.replace(character, escaped)
    return raw
