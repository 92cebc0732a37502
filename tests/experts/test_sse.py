"""Server-sent events: the same events whatever the line ends, and wherever the network cuts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.sse import END, EventReader


def read(*pieces: bytes, max_bytes: int = 1000) -> list[bytes]:
    reader = EventReader(max_bytes=max_bytes)
    return [event for piece in (*pieces, END) for event in reader.feed(piece)]


@pytest.mark.parametrize(
    ("text", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\ndata:  b\n\n", [b"a", b" b"]),
        (b": keep-alive\n\ndata: a\n\n", [b"a"]),
        (b"event: x\nid: 7\nretry: 10\ndata: a\n\n", [b"a"]),
        (b"data: a\n: comment inside\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\n\n\n\n\ndata: b\n\n", [b"a", b"b"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a", [b"a"]),
        (b"data\n\ndata:\n\n", []),
        (b"database: a\n\n", []),
        (b"", []),
        ("data: žluť 🐎\n\n".encode(), ["žluť 🐎".encode()]),
    ],
)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_events(text: bytes, events: list[bytes], line_end: bytes) -> None:
    assert read(text.replace(b"\n", line_end)) == events


STREAM = "data: {}\n\n: hm\n\ndata: žluť\ndata:🐎\n\nevent: x\ndata: b\n\n\ndata: [DONE]\n\n".encode()
EVENTS = [b"{}", "žluť\n🐎".encode(), b"b", b"[DONE]"]


@given(st.lists(st.integers(0, 90)), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_cut_anywhere_it_is_the_same(cuts: list[int], line_end: bytes) -> None:
    stream = STREAM.replace(b"\n", line_end)
    places = sorted({0, len(stream), *(c for c in cuts if c < len(stream))})
    assert read(*(stream[a:b] for a, b in itertools.pairwise(places))) == EVENTS


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_an_event_is_given_as_soon_as_its_last_byte_is_there(line_end: bytes) -> None:
    reader = EventReader(max_bytes=100)
    event = b"data: a" + line_end + line_end
    given = [bool(reader.feed(event[i : i + 1])) for i in range(len(event))]
    assert given.count(True) == 1
    assert given.index(True) == event.rindex(line_end[:1])


def test_an_event_without_end_is_cut_off() -> None:
    reader = EventReader(max_bytes=100)
    reader.feed(b"data: " + b"x" * 90)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        reader.feed(b"x" * 10)


def test_many_events_are_no_large_event() -> None:
    reader = EventReader(max_bytes=100)
    assert sum(len(reader.feed(b"data: x\n\ndat") + reader.feed(b"a: y\n\n")) for _ in range(100)) == 200
