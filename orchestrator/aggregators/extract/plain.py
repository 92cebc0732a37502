"""Free text, made comparable: case, white space and the punctuation around words do not count."""

_EDGES = ".,;:!?\"'`*_()[]{}<>“”‘’«»…。，！？"
_LONG = 20_000
"""Characters. Texts this long agree only when they are copies, so more than trimming them would be wasted."""


def plain(text: str) -> str | None:
    """``text`` in lower case, its words without the punctuation around them, or None when nothing is left."""
    if len(text) > _LONG:
        return text.strip() or None
    words = (word.strip(_EDGES) for word in text.casefold().split())
    return " ".join(word for word in words if word) or text.strip() or None


def tail(text: str, size: int = 16_384) -> str:
    """The end of ``text``, where answers stand: what bounds the cost of looking for one."""
    return text[-size:]
