"""The parts that have an arithmetic of their own: the input's lines, the seconds of generation, forms in pieces."""

import gzip
import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import BadRequest, ConfigError, Unavailable
from orchestrator.batches.output import whole
from orchestrator.batches.plan import stretches
from orchestrator.batches.source import Source
from orchestrator.batches.tally import Busy, Meter, Tally
from orchestrator.batches.upload import Form
from orchestrator.dispatch import EngineStatus

FORM = (
    b'--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--xx\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\none\r\n--xy\ntwo\r\n--xx--\r\n"
)


def test_lines_know_where_they_lie(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"one\n\n  \ntoo long a line\nlast")
    source = Source(path, max_line_bytes=8)
    places = [place for place, _ in source.lines()]
    assert [(p.n, p.offset, p.size_bytes, p.too_large) for p in places] == [
        (1, 0, 4, False),
        (4, 8, 16, True),
        (5, 24, 4, False),
    ]
    assert source.read(places[2].offset, places[2].size_bytes) == b"last"
    assert [p.n for p, _ in source.lines(n=4, offset=24)] == [5]
    source.close()


def test_the_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "in"
    path.write_bytes("\ufeffone\n\ufefftwo\n".encode())
    source = Source(path, max_line_bytes=8)
    (first, raw), (second, other) = source.lines()
    assert (first.n, first.offset, first.size_bytes, raw) == (1, 3, 4, b"one\n")
    assert source.read(first.offset, first.size_bytes) == raw
    assert (second.offset, other) == (7, "\ufefftwo\n".encode())
    source.close()
    path.write_bytes(b"\xef\xbb\xbf")
    source = Source(path, max_line_bytes=8)
    assert list(source.lines()) == []
    source.close()


@given(
    lines=st.lists(st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"x")), max_size=40), at=st.integers(0, 40)
)
def test_reading_goes_on_anywhere(tmp_path_factory, lines, at):
    path = tmp_path_factory.mktemp("source") / "in"
    path.write_bytes(b"# the first line\n" + b"".join(line + b"\n" for line in lines))
    source = Source(path, max_line_bytes=8)
    everything = [item for piece in stretches(source, n=0, offset=0) for item in piece]
    head = everything[:at]
    n, offset = (head[-1][0].n, head[-1][0].offset + head[-1][0].size_bytes) if head else (0, 0)
    rest = [item for piece in stretches(source, n=n, offset=offset) for item in piece]
    assert head + rest == everything
    source.close()


def test_a_source_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="Cannot read"):
        Source(tmp_path / "none", max_line_bytes=8)


@pytest.mark.parametrize(("raw", "what"), [("{}".encode("utf-16"), "UTF-16"), (gzip.compress(b"{}"), "gzip")])
def test_a_source_that_is_no_utf_8_is_refused_as_a_whole(tmp_path, raw, what):
    (tmp_path / "in").write_bytes(raw)
    with pytest.raises(ConfigError, match=what):
        Source(tmp_path / "in", max_line_bytes=8)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 10)), max_size=40))
def test_busy_is_the_length_of_the_union(intervals):
    busy = Busy()
    total = sum(busy.add(start, start + length) for start, length in intervals)
    assert total == len({second for start, length in intervals for second in range(start, start + length)})


def test_loads_of_others_are_not_the_batchs():
    meter = Meter(tally=Tally(loads=2, load_s=1.0))

    def there(loads, load_s):
        return {"a": EngineStatus(state="ready", waiting={"online": 0, "batch": 0}, loads=loads, load_s=load_s)}

    meter.look(there(5, 50.0))
    tally = meter.look(there(6, 53.0))
    assert (tally.loads, tally.load_s) == (3, 4.0)
    assert Tally.read(tally.facts()) == tally


@given(st.lists(st.integers(1, len(FORM)), max_size=12))
def test_a_form_in_any_pieces(cuts):
    file = io.BytesIO()
    form = Form(b"xx", file)
    edges = [0, *sorted(cuts), len(FORM)]
    for start, end in itertools.pairwise(edges):
        form.feed(FORM[start:end])
    upload = form.close()
    assert (upload.name, upload.purpose, upload.size_bytes) == ("a.jsonl", "batch", len(file.getvalue()))
    assert file.getvalue() == b"one\r\n--xy\ntwo"


@pytest.mark.parametrize("end", [0, 10, 90, 150, len(FORM) - 6])
def test_a_form_that_was_cut_off(end):
    form = Form(b"xx", io.BytesIO())
    form.feed(FORM[:end])
    with pytest.raises(BadRequest, match="ends in the middle"):
        form.close()


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"before")

    def break_off(exc):
        with whole(path) as file:
            file.write(b"half")
            raise exc

    with pytest.raises(RuntimeError):
        break_off(RuntimeError())
    with pytest.raises(Unavailable, match="--resume"):
        break_off(OSError(28, "No space left on device"))
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with whole(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after"
