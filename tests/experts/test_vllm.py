"""What the real engine answers: vLLM with SmolLM2-135M-Instruct on this machine's CPU."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest

from experts.base import EngineExpert, collect, collect_choices
from experts.errors import BadRequest, ConfigError, ContextLengthExceeded
from experts.types import ExpertSpec, Message, Request, SamplingParams
from experts.vllm import VllmEngine
from tests.experts.asking import FRANCE, PLAIN, STORY, ask, chat, has_work

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]

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
