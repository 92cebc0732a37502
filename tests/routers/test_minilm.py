"""The real all-MiniLM-L6-v2, loaded once."""

import asyncio
import threading

import numpy as np
import pytest

from experts.errors import ConfigError
from routers.encoders import MiniLM
from routers.runtimes import PACKAGES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def minilm():
    return MiniLM()


async def test_embeddings_are_of_unit_length_and_near_in_meaning(minilm, capfd):
    cat, kitten, bonds = vectors = await minilm.encode(
        ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The yield of government bonds rose."]
    )
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert cat @ kitten > 0.5 > 0.2 > cat @ bonds
    assert capfd.readouterr() == ("", ""), "loading wrote past the log"


async def test_a_text_alone_and_in_a_batch_is_the_same(minilm):
    texts = ["short", "a much longer text about nothing " * 20, "of middle length, more or less"]
    together = await minilm.encode(texts)
    alone = MiniLM(cache_size=1)
    for row, text in zip(together, texts, strict=True):
        np.testing.assert_allclose(row, (await alone.encode([text]))[0], atol=1e-5)


async def test_a_giant_text_is_read_up_to_256_tokens(minilm):
    (start, giant) = await minilm.encode(["word " * 400, "word " * 1_000_000])
    np.testing.assert_array_equal(start, giant)
    assert await minilm.count_tokens(["word " * 1_000_000]) == 256
    assert await minilm.count_tokens(["hello world"]) == 4  # with the marks of start and end


async def test_one_thread_is_the_encoder_s_own_affair():
    import torch

    before, met_before = torch.get_num_threads(), met_by_a_new_thread()
    encoder = MiniLM(threads=1, runtime="torch")
    await encoder.encode(["load it"])
    assert await asyncio.wrap_future(encoder._worker.submit(torch.get_num_threads)) == 1
    assert torch.get_num_threads() == before
    assert met_by_a_new_thread() == met_before


def met_by_a_new_thread():
    """How many threads torch has for a thread that has not set them itself, whatever tests before did in this one."""
    import torch

    met: list[int] = []
    thread = threading.Thread(target=lambda: met.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return met


async def test_a_model_of_another_width_is_refused(monkeypatch):
    monkeypatch.setattr(MiniLM, "width", 256)
    with pytest.raises(ConfigError, match="384 numbers a text, expected 256"):
        await MiniLM(runtime="torch").encode(["a"])


@pytest.mark.parametrize("runtime", ["ctranslate2", "onnx"])
async def test_a_runtime_gives_nearly_the_reference_s_vectors(runtime):
    pytest.importorskip(PACKAGES[runtime])
    texts = ["A cat sleeps.", "Which of the following bonds is riskiest?\nA\nB\nC", "word " * 300]
    reference = await MiniLM(runtime="torch").encode(texts)
    other = MiniLM(runtime=runtime)
    assert (np.sum(await other.encode(texts) * reference, axis=1) > 0.99).all()
    assert await other.count_tokens(texts) == await MiniLM(runtime="torch").count_tokens(texts)


async def test_a_damaged_folder_is_explained(tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"does not load|numbers a text"):
        await MiniLM(model=str(tmp_path)).encode(["a"])
