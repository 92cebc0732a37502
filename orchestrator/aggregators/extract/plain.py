"""Free text, made comparable: case, white space and the punctuation around words do not count."""

from collections.abc import Iterator, Sequence

_EDGES = ".,;:!?\"'`*_()[]{}<>“”‘’«»…。，！？"
_LONG = 20_000
"""Characters. Texts this long agree only when they are copies, so more than trimming them would be wasted."""


def plain(text: str) -> str | None:
    """``text`` in lower case, its words without the punctuation around them, or None when nothing is left."""
    if len(text) > _LONG:
        return text.strip() or None
    words = (word.strip(_EDGES) for word in text.casefold().split())
    return " ".join(word for word in words if word) or text.strip() or None


def backwards(text: str, words: Sequence[str]) -> Iterator[int]:
    """Where one of ``words`` (lower case) begins in ``text``, whatever its case, the last place first. An expression
    that ignores case takes ten times as long to find them."""
    low = text.lower()
    if len(low) != len(text):  # this letter alone grows
        low = text.replace("İ", "i").lower()
    places = {word: low.rfind(word) for word in words}
    while (at := max(places.values())) >= 0:
        yield at
        places = {word: low.rfind(word, 0, at) if place == at else place for word, place in places.items()}


def tail(text: str, size: int = 16_384) -> str:
    """The end of ``text``, where answers stand: what bounds the cost of looking for one."""
    return text[-size:]
