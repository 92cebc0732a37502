"""Server-sent events, cut from bytes as they arrive: the data of each event, wherever the network cut it.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

END = b"\n\n"
_BOM = b"\xef\xbb\xbf"


class EventReader:
    """Feed it bytes, get the data of the events that they complete. Comments and other fields are passed over."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Raises ValueError when one event grows past ``max_bytes``. At the stream's end, feed END for what is left."""
        data = self._plain_lines(data)
        # Joined only when an event may be complete: an event in a thousand pieces stays linear work.
        ends = END in data or (data[:1] == b"\n" and bool(self._kept) and self._kept[-1].endswith(b"\n"))
        if not ends:
            self._keep(data)
            return []
        if self._kept:
            data = b"".join((*self._kept, data))
            self._kept, self._kept_bytes = [], 0
        whole, _, rest = data.rpartition(END)
        self._keep(rest)
        return [found for event in whole.split(END) if (found := _data(event))]

    def _plain_lines(self, data: bytes) -> bytes:
        """``data`` with every line ended by one LF. A CR ends its line at once; an LF right after it is part of it."""
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data

    def _keep(self, data: bytes) -> None:
        if data:
            self._kept.append(data)
            self._kept_bytes += len(data)
            if self._kept_bytes > self._max_bytes:
                raise ValueError(f"an event of more than {self._max_bytes} bytes")


def _data(event: bytes) -> bytes:
    """The data lines of ``event``, joined; empty when it has none."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    fields = [line.removeprefix(_BOM).partition(b":") for line in event.split(b"\n")]
    return b"\n".join(value.removeprefix(b" ") for name, _, value in fields if name == b"data")
