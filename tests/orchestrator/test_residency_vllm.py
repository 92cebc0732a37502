"""Two real engines and one slot."""

import gc

import psutil
import pytest

from experts.base import collect
from experts.types import EngineSpec, ExpertSpec, Message, Request, SamplingParams
from experts.vllm import VllmEngine
from orchestrator.dispatch import Dispatcher
from orchestrator.loading import used_bytes
from orchestrator.residency import Residency
from orchestrator.swaps import Rules

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

OPTIONS = {"max_model_len": 256, "max_num_seqs": 4, "kv_cache_memory_bytes": 2**28}
QUESTION = Message(role="user", content="What is the capital of France?")


async def test_two_engines_take_turns_and_give_their_memory_back() -> None:
    specs = [
        EngineSpec(engine_id=e, backend="vllm", model="smollm2-135m-instruct", options=OPTIONS) for e in ("one", "two")
    ]
    engines = {spec.engine_id: VllmEngine(spec) for spec in specs}
    dispatcher = Dispatcher(Residency(engines, rules=Rules(slots=1)))
    before, known = used_bytes(), set(psutil.Process().children(recursive=True))
    assert before is not None
    loaded = []
    for engine_id in ("one", "two", "one"):
        async with dispatcher.lease(engine_id, priority="batch"):
            request = Request(messages=(QUESTION,), params=SamplingParams(max_tokens=16, temperature=0))
            stream = engines[engine_id].generate(request, ExpertSpec(expert_id="x", engine_id=engine_id))
            assert "Paris" in (await collect(stream, request)).text
            new = [p for p in psutil.Process().children(recursive=True) if p not in known]
            assert sum("EngineCore" in " ".join(p.cmdline()) for p in new) == 1, "two engines at a time"
            loaded.append(used_bytes() or 0)
    assert {e: s.loads for e, s in dispatcher.snapshot().items()} == {"one": 2, "two": 1}
    await dispatcher.residency.close()
    for engine in engines.values():
        await dispatcher.residency.drop(engine)
    gc.collect()
    after = used_bytes() or 0
    load_s = {e: round(s.load_s, 1) for e, s in dispatcher.snapshot().items()}
    print(
        load_s,
        "s;",
        round(before / 2**20),
        [round((n - before) / 2**20) for n in loaded],
        round((after - before) / 2**20),
        "MiB",
    )
    assert loaded[2] < loaded[0] + 2**29, "what was taken came back before the next load"
    assert loaded[2] - after > 2**29
