"""The real engine: vLLM with SmolLM2-135M-Instruct on this machine's CPU."""

import asyncio
import gc
import json
import re
import signal
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from experts.base import EngineExpert, collect, collect_choices
from experts.errors import BadRequest, CollegiumError, ConfigError, ContextLengthExceeded, ExpertFailed
from experts.types import ChunkStream, Completion, EngineSpec, ExpertSpec, Message, Request, SamplingParams
from experts.vllm import VllmEngine

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

PLAIN = ExpertSpec(expert_id="plain", engine_id="smol")
FRANCE = "What is the capital of France?"
STORY = "Write a long story about a lighthouse keeper and the sea."
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def tool(name: str) -> dict[str, Any]:
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "parameters": {**city, "additionalProperties": False}}}


def chat(text: str, *, temperature: float = 0.0, max_tokens: int = 24, **params: Any) -> Request:
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, **params)
    return Request(messages=(Message(role="user", content=text),), params=sampling)


async def ask(engine: VllmEngine, request: Request, expert: ExpertSpec = PLAIN) -> Completion:
    return await collect(engine.generate(request, expert), request)


async def drain(stream: ChunkStream) -> None:
    async for _ in stream:
        pass


async def has_work(engine: VllmEngine) -> bool:
    """Whether the scheduler, in the process below, still has a request."""
    server = await engine._running()
    return bool(await server.llm.engine_core.call_utility_async("has_work"))


async def drained(engine: VllmEngine) -> bool:
    for _ in range(40):
        if not await has_work(engine):
            return True
        await asyncio.sleep(0.05)
    return False


def engine_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]


async def test_knows_the_capital_of_france(vllm_engine: VllmEngine) -> None:
    answer = await ask(vllm_engine, chat(FRANCE))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert answer.expert_id == "plain"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)
    assert 0 < answer.ttft_s < answer.latency_s


async def test_system_prompt_and_demonstrations_reach_the_model(vllm_engine: VllmEngine) -> None:
    spec = ExpertSpec(
        expert_id="parrot",
        engine_id="smol",
        system_prompt="You answer every question with one colour.",
        demos=(("apple", "red"), ("grass", "green"), ("sky", "blue"), ("snow", "white")),
    )
    request = chat("sun", max_tokens=4)
    answer = await collect(EngineExpert(spec, vllm_engine).generate(request), request)
    assert answer.text.strip(" .").lower() in {"yellow", "white", "blue", "red", "orange", "gold", "green"}


async def test_stream_gives_in_pieces_what_vllm_gives_whole(vllm_engine: VllmEngine) -> None:
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    request = chat(STORY, max_tokens=20)
    async with aclosing(vllm_engine.generate(request, PLAIN)) as stream:
        pieces = [chunk.text async for chunk in stream if chunk.text]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in (("system", system), ("user", STORY)))
    params = VllmParams(temperature=0, max_tokens=20, output_kind=RequestOutputKind.FINAL_ONLY)
    llm = (await vllm_engine._running()).llm
    whole = [out async for out in llm.generate(f"{prompt}<|im_start|>assistant\n", params, "whole")]
    assert len(pieces) > 10
    assert "".join(pieces) == whole[-1].outputs[0].text


async def test_same_seed_same_text(vllm_engine: VllmEngine) -> None:
    texts = [(await ask(vllm_engine, chat(STORY, temperature=1.0, seed=seed))).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


async def test_top_p_needs_no_compiler(vllm_engine: VllmEngine) -> None:
    assert (await ask(vllm_engine, chat(FRANCE, temperature=0.5, top_p=0.1, seed=1))).text


async def test_stop_ends_the_answer_before_the_word(vllm_engine: VllmEngine) -> None:
    answer = await ask(vllm_engine, chat(FRANCE, stop=("Paris",)))
    assert answer.finish_reason == "stop"
    assert answer.text == "The capital of France is "


async def test_max_tokens_ends_the_answer_for_length(vllm_engine: VllmEngine) -> None:
    answer = await ask(vllm_engine, chat(STORY, max_tokens=3))
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == 3


async def test_prompt_is_continued_without_a_template(vllm_engine: VllmEngine) -> None:
    request = Request(prompt="The capital of France is", params=SamplingParams(temperature=0.0, max_tokens=3))
    answer = await ask(vllm_engine, request)
    assert answer.text.startswith(" Paris")
    assert answer.usage.prompt_tokens == 5


async def test_json_schema_is_kept(vllm_engine: VllmEngine) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    request = chat("Describe Ada Lovelace.", max_tokens=60)
    answer = await ask(vllm_engine, Request(messages=request.messages, params=request.params, response_format=schema))
    person = json.loads(answer.text)
    assert set(person) == {"name", "age"}
    assert 1 <= person["age"] <= 99


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_tool_choice_forces_a_valid_call(vllm_engine: VllmEngine, choice: Any) -> None:
    messages = (Message(role="user", content="How is the weather in Paris?"),)
    params = SamplingParams(temperature=0.0, max_tokens=60)
    tools = (tool("weather"), tool("news")) if choice != "required" else (tool("weather"),)
    answer = await ask(vllm_engine, Request(messages=messages, params=params, tools=tools, tool_choice=choice))
    (call,) = answer.tool_calls
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in {"Paris", "Rome"}


async def test_n_gives_that_many_choices(vllm_engine: VllmEngine) -> None:
    request = chat(STORY, temperature=1.0, max_tokens=8, n=2, seed=3)
    first, second = await collect_choices(vllm_engine.generate(request, PLAIN), request)
    assert (first.index, second.index) == (0, 1)
    assert first.text != second.text
    assert first.usage.completion_tokens == 16


async def test_logprobs_of_chat(vllm_engine: VllmEngine) -> None:
    answer = await ask(vllm_engine, chat(FRANCE, max_tokens=4, logprobs=2))
    assert answer.logprobs is not None
    entries = answer.logprobs["content"]
    assert "".join(e["token"] for e in entries) == answer.text
    assert all(e["logprob"] <= 0 and len(e["top_logprobs"]) == 2 for e in entries)


async def test_logprobs_of_a_prompt(vllm_engine: VllmEngine) -> None:
    request = Request(prompt="One, two,", params=SamplingParams(temperature=0.0, max_tokens=2, logprobs=1))
    async with aclosing(vllm_engine.generate(request, PLAIN)) as stream:
        chunks = [chunk async for chunk in stream]
    assert sum(len(chunk.logprobs["tokens"]) for chunk in chunks if chunk.logprobs) == 2


async def test_adapters_answer_side_by_side(vllm_engine: VllmEngine) -> None:
    experts = [PLAIN] + [ExpertSpec(expert_id=a, engine_id="smol", adapter=a) for a in ("loud", "odd")]
    alone = [(await ask(vllm_engine, chat(FRANCE), expert)).text for expert in experts]
    together = await asyncio.gather(*(ask(vllm_engine, chat(FRANCE), expert) for expert in experts))
    assert len(set(alone)) == 3
    assert "Paris" in alone[0]
    assert len({answer.text for answer in together}) == 3
    assert together[0].text == alone[0]


async def test_unknown_adapter_is_named(vllm_engine: VllmEngine) -> None:
    with pytest.raises(ConfigError, match="no adapter 'quiet', only loud, odd"):
        await ask(vllm_engine, chat(FRANCE), ExpertSpec(expert_id="x", engine_id="smol", adapter="quiet"))


@pytest.mark.parametrize("words", [300, 100_000])
@pytest.mark.parametrize("max_tokens", [1, None])
async def test_too_long_a_chat_gives_both_lengths(vllm_engine: VllmEngine, words: int, max_tokens: int | None) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    with pytest.raises(ContextLengthExceeded) as caught:
        await ask(vllm_engine, Request(messages=(Message(role="user", content="word " * words),), params=params))
    assert caught.value.context_length == 256
    assert caught.value.prompt_tokens == words + 31


async def test_too_long_a_prompt_gives_both_lengths(vllm_engine: VllmEngine) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        await ask(vllm_engine, Request(prompt="word " * 300, params=SamplingParams(max_tokens=50)))
    assert (caught.value.context_length, caught.value.prompt_tokens) == (256, 301)


@pytest.mark.parametrize(
    "request_",
    [
        chat(FRANCE, temperature=-1.0),
        Request(messages=(Message(role="user", content="x"),), tool_choice="required"),
        Request(
            messages=(Message(role="user", content="x"),),
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}},
        ),
    ],
    ids=["temperature", "tool_choice without tools", "schema"],
)
async def test_what_vllm_refuses_is_the_callers_fault(vllm_engine: VllmEngine, request_: Request) -> None:
    with pytest.raises(BadRequest):
        await ask(vllm_engine, request_)
    assert not await has_work(vllm_engine)


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
