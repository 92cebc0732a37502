"""The real engine's life: cancelled calls, a killed process, unloading, and all the ways not to start."""

import asyncio
import gc
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from experts.errors import CollegiumError, ConfigError, ExpertFailed
from experts.types import EngineSpec
from experts.vllm import VllmEngine
from tests.experts.asking import FRANCE, PLAIN, STORY, ask, chat, drain, drained, engine_processes, has_work

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]


async def test_closing_the_stream_ends_the_generation(vllm_engine: VllmEngine) -> None:
    stream = vllm_engine.generate(chat(STORY, max_tokens=200), PLAIN)
    await anext(stream)
    assert await has_work(vllm_engine)
    await stream.aclose()
    assert await drained(vllm_engine)


async def test_cancelling_the_caller_ends_the_generation(vllm_engine: VllmEngine) -> None:
    task = asyncio.create_task(ask(vllm_engine, chat(STORY, max_tokens=200)))
    while not await has_work(vllm_engine):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await drained(vllm_engine)


async def test_a_seed_survives_a_prompt_that_is_read_in_pieces() -> None:
    options = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**27}
    options["enable_prefix_caching"] = False
    engine = VllmEngine(EngineSpec(engine_id="pieces", backend="vllm", model="smollm2-135m-instruct", options=options))
    await engine.load()
    try:
        request = chat(STORY * 12, max_tokens=8, temperature=1.0, seed=7)
        first, again = await ask(engine, request), await ask(engine, request)
        assert first.text == again.text
        beside = await asyncio.gather(*(ask(engine, replace(request, request_id=f"r{i}")) for i in range(4)))
        assert all(answer.text for answer in beside)
    finally:
        await engine.unload()


async def test_load_again_changes_nothing(vllm_engine: VllmEngine) -> None:
    before = await vllm_engine._running()
    await asyncio.gather(vllm_engine.load(), vllm_engine.load())
    assert await vllm_engine._running() is before


async def test_killed_engine_fails_its_calls_and_starts_again(vllm_engine: VllmEngine) -> None:
    (process,) = engine_processes()
    stream = vllm_engine.generate(chat(STORY, max_tokens=200), PLAIN)
    await anext(stream)
    process.send_signal(signal.SIGKILL)
    with pytest.raises(ExpertFailed, match="has ended") as caught:
        await asyncio.wait_for(drain(stream), 20)
    assert caught.value.retryable
    answers = await asyncio.gather(*(ask(vllm_engine, chat(FRANCE)) for _ in range(2)))
    assert all("Paris" in answer.text for answer in answers)
    assert len(engine_processes()) == 1


async def test_unload_gives_the_memory_back(vllm_engine: VllmEngine) -> None:
    (process,) = engine_processes()
    taken = process.memory_info().rss
    assert taken > 2**29
    stream = vllm_engine.generate(chat(STORY, max_tokens=200), PLAIN)
    await anext(stream)
    await vllm_engine.unload()
    assert not process.is_running()
    assert engine_processes() == []
    with pytest.raises(ExpertFailed):
        await drain(stream)
    with pytest.raises(ExpertFailed, match="not loaded") as caught:
        await ask(vllm_engine, chat(FRANCE))
    assert not caught.value.retryable
    await vllm_engine.unload()
    await vllm_engine.load()
    assert "Paris" in (await ask(vllm_engine, chat(FRANCE))).text


FAILURES = {
    "unknown option": ({"max_modle_len": 64}, ConfigError, "did you mean 'max_model_len'"),
    "wrong value": ({"max_model_len": -7}, ConfigError, "vLLM refuses its model or its options(?s:.*)max_model_len"),
    "no adapter": ({"adapters": {"a": "/nowhere"}}, ConfigError, "adapter 'a' is no LoRA folder"),
    "no template": ({"chat_template": "/nowhere.jinja"}, ConfigError, "chat template"),
    "no room in the cache": ({"max_model_len": 8192, "kv_cache_memory_bytes": 2**20}, ExpertFailed, "did not start"),
}


async def fail_to_load(engine: VllmEngine) -> tuple[type[CollegiumError], str, bool]:
    """What load() raises, and nothing that would keep vLLM's objects alive."""
    try:
        await engine.load()
    except CollegiumError as exc:
        return type(exc), exc.message, exc.retryable
    raise AssertionError("the engine has loaded")


@pytest.mark.parametrize("case", FAILURES)
async def test_load_says_what_is_wrong(case: str) -> None:
    options, kind, message = FAILURES[case]
    engine = VllmEngine(EngineSpec(engine_id="sick", backend="vllm", model="smollm2-135m-instruct", options=options))
    before = engine_processes()
    raised, said, retryable = await fail_to_load(engine)
    assert raised is kind
    assert re.search(message, said)
    assert "Engine 'sick'" in said
    assert not retryable
    assert engine_processes() == before
    with pytest.raises(ExpertFailed, match="not loaded"):
        await ask(engine, chat(FRANCE))
    await engine.unload()
    gc.collect()  # what vLLM leaves, while warnings of it are let pass


async def test_load_says_when_memory_is_short() -> None:
    spec = EngineSpec(engine_id="big", backend="vllm", model="smollm2-135m-instruct", memory_gib=10_000)
    with pytest.raises(ConfigError, match=r"needs about 10000\.0 GiB, but only .* GiB are free"):
        await VllmEngine(spec).load()


async def test_load_names_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vLLM refuses its model"):
        await VllmEngine(EngineSpec(engine_id="none", backend="vllm", model=str(tmp_path))).load()


SERVICE = """
import asyncio
from experts.types import EngineSpec
from experts.vllm import VllmEngine

async def main():
    options = {"max_model_len": 64, "kv_cache_memory_bytes": 2**26}
    await VllmEngine(EngineSpec(engine_id="x", backend="vllm", model="smollm2-135m-instruct", options=options)).load()
    print("ready", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.slow
async def test_engine_ends_when_the_service_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "service.py"
    script.write_text(SERVICE)
    service = await asyncio.create_subprocess_exec(sys.executable, str(script), stdout=asyncio.subprocess.PIPE)
    try:
        assert service.stdout is not None
        assert await service.stdout.readline() == b"ready\n"
        engines = [p for p in psutil.Process(service.pid).children() if "EngineCore" in " ".join(p.cmdline())]
        assert len(engines) == 1
    finally:
        service.kill()
        await service.wait()
    _, alive = psutil.wait_procs(engines, timeout=10)
    assert alive == []
