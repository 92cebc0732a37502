import numpy as np
import pytest

from experts.errors import ConfigError
from orchestrator.build import make_encoder
from routers import static
from routers.encoders import MiniLM
from routers.questions import content_key
from routers.static import WordLlama


async def test_texts_of_one_meaning_are_nearer_than_others():
    bread, baker, court = await WordLlama().encode(
        ["How do you bake bread?", "A recipe for a loaf of bread", "The court of appeal upheld the contract"]
    )
    assert bread @ baker > bread @ court + 0.2


async def test_vectors_have_unit_length_whatever_the_text():
    texts = ["hello", "", " \n", "\ud800 broken", "x" * 50_000, "日本語"]
    vectors = await WordLlama().encode(texts)
    assert vectors.shape == (6, 256)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


async def test_a_text_alone_is_encoded_as_it_is_in_a_large_batch():
    texts = [f"question {i} about " + "word " * (i % 7) for i in range(100)]
    encoder = WordLlama()
    many, one = await encoder.encode(texts), await encoder.encode([texts[61]])
    assert (many[61] == one[0]).all()
    assert (await encoder.encode([])).shape == (0, 256)
    assert await encoder.count_tokens(["one two three"]) == 3


async def test_white_space_does_not_count():
    plain, laid_out = await WordLlama().encode(["Which of the two is it?", " \nWhich  of\tthe\n\ntwo is it?\n "])
    assert (plain == laid_out).all()


def test_it_is_made_by_name_and_a_missing_package_is_named(monkeypatch):
    assert isinstance(make_encoder("wordllama", 10), WordLlama)
    monkeypatch.setattr(static.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install wordllama"):
        WordLlama()


def test_cached_embeddings_belong_to_one_encoder_and_its_texts():
    encoder = WordLlama()
    key = content_key(encoder, ["ab", "c"])
    assert key == content_key(encoder, ["ab", "c"])
    other = type("Other", (), {"name": MiniLM.NAME, "width": 384, "runtime": "torch"})()
    assert (
        len({key, content_key(encoder, ["a", "bc"]), content_key(encoder, ["ab"]), content_key(other, ["ab", "c"])})
        == 4
    )
