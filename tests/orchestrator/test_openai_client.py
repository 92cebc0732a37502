"""The official client against the service, as a user has it: nothing here knows what is inside."""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest
from pydantic import BaseModel

from experts.fake import FakeEngine
from experts.types import Chunk, ChunkStream, EngineSpec, ExpertSpec, Request
from tests.orchestrator.served import Served, fake_config, serving

ASK: list[Any] = [{"role": "user", "content": "Ann"}]
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    engines = {
        "a": {"backend": "fake", "options": {"text": "{expert_id} says hello to {question}", "chunks": 4}},
        "caller": {"backend": "fake", "options": {"text": "", "tool_calls": [CALL]}},
        "short": {"backend": "fake", "options": {"context_length": 3}},
        "broken": {"backend": "fake", "options": {"fail": ["refuse"]}},
    }
    experts = {
        "one": {"engine": "a", "usd_per_mtok_out": 2},
        "two": {"engine": "a"},
        "caller": {"engine": "caller"},
        "short": {"engine": "short"},
        "broken": {"engine": "broken"},
    }
    panel = {"router": "always", "top_k": 2, "aggregator": "vote"}
    with serving(
        fake_config({"engines": engines, "experts": experts, "policies": {"default": {}, "panel": panel}})
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


def extra(**keys: Any) -> dict[str, Any]:
    return {"collegium": keys}


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="collegium", messages=ASK, temperature=1, max_tokens=9, seed=1)
    assert reply.choices[0].message.content == "one says hello to Ann"
    assert (reply.choices[0].finish_reason, reply.object, reply.model) == ("stop", "chat.completion", "one")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (1, 5, 6)
    assert reply.id.startswith("req_")
    assert reply.model_extra == {}  # unasked, nothing is explained


def test_a_reply_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="collegium", messages=ASK)
    history: list[Any] = [*ASK, first.choices[0].message, {"role": "user", "content": "Bob"}]
    again = client.chat.completions.create(model="collegium", messages=history)
    assert again.choices[0].message.content == "one says hello to Bob"


def test_a_reply_can_be_sent_back_as_the_client_dumps_it(client: openai.OpenAI) -> None:
    """With all the nulls of OpenAI's own format, and what other services put beside them."""
    message = client.chat.completions.create(model="collegium", messages=ASK).choices[0].message.model_dump()
    assert message["annotations"] is None
    history: list[Any] = [*ASK, message | {"reasoning_content": "so"}, {"role": "user", "content": "Bob"}]
    again = client.chat.completions.create(model="collegium", messages=history)
    assert again.choices[0].message.content == "one says hello to Bob"


def test_every_kind_of_message(client: openai.OpenAI) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "An"}, {"type": "text", "text": "n"}]},
    ]
    reply = client.chat.completions.create(model="two", messages=messages)
    assert reply.choices[0].message.content == "two says hello to Ann"


def test_stream(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="collegium", messages=ASK, stream=True))
    deltas = [c.choices[0].delta for c in chunks]
    assert [d.content for d in deltas] == ["one sa", "ys hel", "lo to ", "Ann", None]
    assert [d.role for d in deltas] == ["assistant", None, None, None, None]
    assert [c.choices[0].finish_reason for c in chunks] == [None, None, None, None, "stop"]
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_stream_with_usage_and_explanation(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="collegium",
        messages=ASK,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra(explain=True),
    ) as stream:
        *_, usage, told = list(stream)
        assert stream.response.headers["x-collegium-decision"] == usage.id
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.total_tokens == 6
    assert told.model_extra is not None
    assert told.model_extra["collegium"]["decision"]["expert_ids"] == ["one"]


def test_the_clients_own_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="collegium", messages=ASK) as stream:
        stream.until_done()
    assert stream.get_final_completion().choices[0].message.content == "one says hello to Ann"


async def test_async_client(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        reply = await client.chat.completions.create(model="two", messages=ASK)
        pieces = [c async for c in await client.chat.completions.create(model="two", messages=ASK, stream=True)]
        names = [m.id async for m in client.models.list()]
    assert reply.choices[0].message.content == "two says hello to Ann"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == "two says hello to Ann"
    assert names[0] == "collegium"


def test_several_choices(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="one", messages=ASK, n=3)
    assert [(c.index, c.message.content) for c in reply.choices] == [(i, "one says hello to Ann") for i in range(3)]
    texts, roles, ends = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for chunk in client.chat.completions.create(model="one", messages=ASK, n=3, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        ends[choice.index] += choice.finish_reason == "stop"
    assert (texts, roles, ends) == (["one says hello to Ann"] * 3, [1] * 3, [1] * 3)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "add"}}])
def test_tools(client: openai.OpenAI, choice: Any) -> None:
    reply = client.chat.completions.create(model="caller", messages=ASK, tools=[ADD], tool_choice=choice)
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls is not None
    assert message.tool_calls[0].model_dump() == {k: v for k, v in CALL.items() if k != "index"}


def test_tool_deltas(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="caller", messages=ASK, tools=[ADD], stream=True))
    calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    assert [c.model_dump() for c in calls] == [CALL]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_what_is_asked_reaches_the_engine() -> None:
    schema = {"name": "answer", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}, "strict": True}
    seen: list[Request] = []
    with serving(fake_config(), make=listening(seen)) as served, served.client() as client:
        client.chat.completions.create(
            model="collegium",
            messages=ASK,
            response_format={"type": "json_schema", "json_schema": schema},  # type: ignore[typeddict-item]
            tools=[ADD],
            tool_choice="none",
            stop=["x", "y"],
            top_p=0.5,
            temperature=0.25,
            max_completion_tokens=7,
            logprobs=True,
            top_logprobs=3,
            presence_penalty=1,
            frequency_penalty=-1,
            seed=-5,
            metadata={"tag": "maths"},
        )
    (request,) = seen
    assert request.response_format == {"type": "json_schema", "json_schema": schema}
    assert list(request.tools) == [ADD]
    assert (request.tool_choice, request.metadata) == ("none", {"tag": "maths"})
    params = request.params
    assert (params.stop, params.top_p, params.temperature, params.max_tokens) == (("x", "y"), 0.5, 0.25, 7)
    assert (params.logprobs, params.presence_penalty, params.frequency_penalty, params.seed) == (3, 1, -1, -5)


def test_what_only_some_engines_know_is_sent_on() -> None:
    seen: list[Request] = []
    more = {"top_k": 5, "min_p": 0.5, "repetition_penalty": 1.5, "chat_template_kwargs": {"enable_thinking": False}}
    more |= {"min_tokens": 2, "ignore_eos": True, "stop_token_ids": [2, 3]}
    with serving(fake_config(), make=listening(seen)) as served, served.client() as client:
        client.chat.completions.create(
            model="one",
            messages=ASK,
            reasoning_effort="low",
            verbosity="high",
            logit_bias={"50": -100},
            service_tier="auto",
            extra_body={**more, "prompt_cache_key": "k", "safety_identifier": "s"},
        )
        client.completions.create(model="one", prompt="x", extra_body={"top_k": None})
    chat, text = (request.params.more for request in seen)
    assert chat == {**more, "reasoning_effort": "low", "verbosity": "high", "logit_bias": {"50": -100}}
    assert text == {}


class Thinking(FakeEngine):
    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        for piece in ("so ", "what"):
            yield Chunk(expert_id=expert.expert_id, reasoning=piece)
        yield Chunk(expert_id=expert.expert_id, text="42", finish_reason="stop")


@pytest.mark.parametrize("model", ["one", "collegium/panel"])
def test_reasoning_stands_beside_the_answer(model: str) -> None:
    panel = {"router": "always", "top_k": 2, "aggregator": "vote"}
    config = fake_config({"policies": {"default": {}, "panel": panel}})
    with serving(config, make=Thinking) as served, served.client() as client:
        message = client.chat.completions.create(model=model, messages=ASK).choices[0].message
        deltas = [c.choices[0].delta for c in client.chat.completions.create(model=model, messages=ASK, stream=True)]
    assert (message.content, message.model_extra) == ("42", {"reasoning_content": "so what"})
    assert "".join(d.content or "" for d in deltas) == "42"
    assert "".join((d.model_extra or {}).get("reasoning_content", "") for d in deltas) == "so what"


class Refusing(FakeEngine):
    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        yield Chunk(expert_id=expert.expert_id, text="I will ", refused=True)
        yield Chunk(expert_id=expert.expert_id, text="not.", refused=True, finish_reason="stop")


class Colour(BaseModel):
    name: str


def test_a_refusal_is_no_content_and_can_be_sent_back() -> None:
    with serving(fake_config(), make=Refusing) as served, served.client() as client:
        message = client.chat.completions.parse(model="one", messages=ASK, response_format=Colour).choices[0].message
        assert (message.content, message.refusal, message.parsed) == (None, "I will not.", None)
        back = [*ASK, {"role": "assistant", "content": None, "refusal": message.refusal}, *ASK]
        chunks = list(client.chat.completions.create(model="one", messages=back, stream=True))
    assert "".join(c.choices[0].delta.refusal or "" for c in chunks) == "I will not."
    assert not any(c.choices[0].delta.content for c in chunks)


def test_models(client: openai.OpenAI) -> None:
    names = [m.id for m in client.models.list()]
    assert names == ["collegium", "collegium/default", "collegium/panel", "one", "two", "caller", "short", "broken"]
    assert client.models.retrieve("collegium/panel").id == "collegium/panel"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_legacy_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="two", prompt="Ann", max_tokens=5, logprobs=1)
    assert (reply.choices[0].text, reply.object) == ("two says hello to Ann", "text_completion")
    chunks = list(client.completions.create(model="two", prompt=["Ann"], stream=True))
    assert [c.choices[0].text for c in chunks] == ["two sa", "ys hel", "lo to ", "Ann", ""]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_embeddings(served: Served, client: openai.OpenAI) -> None:
    host = served.app.state.host
    host.service = replace(host.service, encoder=StubEncoder)
    reply = client.embeddings.create(model="collegium", input=["one", "three"])  # the client asks for base64
    assert [e.embedding for e in reply.data] == [[3.0, 0.5], [5.0, 0.5]]
    assert (reply.model, reply.usage.prompt_tokens) == ("stub", 8)
    plain = client.embeddings.create(model="stub", input="one", encoding_format="float")
    assert plain.data[0].embedding == [3.0, 0.5]
    raw = client.embeddings.with_raw_response.create(model="stub", input="one", encoding_format="base64")
    coded = json.loads(raw.content)["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(coded), dtype="<f4").tolist() == [3.0, 0.5]
    with pytest.raises(openai.NotFoundError, match="stub"):
        client.embeddings.create(model="ada", input="one")
    for wrong in ("", [], [""], ["a", 1], [[1, 2]]):
        with pytest.raises(openai.BadRequestError, match="input"):
            client.embeddings.create(model="stub", input=wrong)  # type: ignore[arg-type]


def test_an_expert_by_name_is_asked_without_routing(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="two", messages=ASK, extra_body=extra(explain=True))
    assert reply.model_extra is not None
    decision = reply.model_extra["collegium"]["decision"]
    assert (reply.model, decision["router"], decision["scores"]) == ("two", "direct", {"two": 1.0})
    with pytest.raises(openai.BadRequestError, match="by name"):
        client.chat.completions.create(model="two", messages=ASK, extra_body=extra(router="random"))


def test_a_named_policy_and_its_bill(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="collegium/panel", messages=ASK, extra_body=extra(explain=True))
    assert reply.model_extra is not None
    told = reply.model_extra["collegium"]
    assert (told["policy"], told["aggregator"], told["decision"]["expert_ids"]) == ("panel", "vote", ["one", "two"])
    assert sorted(c["expert_id"] for c in told["calls"]) == ["one", "two"]
    assert reply.usage is not None
    assert reply.usage.total_tokens == told["usage"]["total_tokens"] == 12  # both calls
    assert told["answer_usage"]["total_tokens"] == 6  # the answer that is seen
    assert told["usd"] == pytest.approx(5 * 2 / 1e6)
    assert sum(told["decision"]["weights"]) == pytest.approx(1)


def test_the_request_changes_its_policy(client: openai.OpenAI) -> None:
    change = extra(aggregator="weighted_vote", top_k=2, max_calls=2, max_usd=1, explain=True)
    reply = client.chat.completions.create(model="collegium", messages=ASK, extra_body=change)
    assert reply.model_extra is not None
    told = reply.model_extra["collegium"]
    assert (told["aggregator"], len(told["calls"])) == ("weighted_vote", 2)


def test_a_seed_makes_routing_reproducible(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> Any:
        body = {"messages": ASK, **extra(router="random", seed=seed)}
        told: Any = client.post("/route", body=body, cast_to=object)
        assert told["decision"]["router"] == "random"
        return told["decision"]["scores"]

    assert drawn(7) == drawn(7) != drawn(8)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"topk": 1}, "collegium.topk"),
        ({"top_k": 0}, "collegium.top_k"),
        ({"top_k": "2"}, "collegium.top_k"),
        ({"router": "nobody"}, "collegium.router"),
        ({"aggregator": "nobody"}, "collegium.aggregator"),
        ({"max_usd": 0}, "collegium.max_usd"),
        ({"seed": 2**64}, "collegium.seed"),
    ],
)
def test_a_wrong_extension_is_named(client: openai.OpenAI, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="collegium", messages=ASK, extra_body=extra(**keys))
    assert caught.value.param == named
    assert named.rsplit(".", 1)[1] in caught.value.message


def test_decisions_can_be_read_back(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="collegium", messages=ASK, extra_body=extra(explain=True)
    )
    request_id = raw.headers["x-collegium-decision"]
    reply = raw.parse()
    assert reply.id == request_id
    assert reply.model_extra is not None
    assert client.get(f"/decisions/{request_id}", cast_to=object) == reply.model_extra["collegium"]


def test_route_decides_and_asks_nobody(served: Served, client: openai.OpenAI) -> None:
    calls = served.engine.calls
    body = {"messages": ASK, "collegium": {"top_k": 2, "aggregator": "vote"}}
    told: Any = client.post("/route", body=body, cast_to=object)
    assert told["decision"]["expert_ids"] == ["one", "two"]
    assert (told["policy"], told["aggregator"]) == ("default", "vote")
    assert served.engine.calls == calls


def test_prompt_past_the_context_gives_both_lengths(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="short", messages=[{"role": "user", "content": "a b c d"}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert "4 tokens" in caught.value.message
    assert "at most 3" in caught.value.message


def test_an_expert_that_fails(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="broken", messages=ASK)
    assert (caught.value.status_code, caught.value.code) == (503, "expert_failed")
    assert caught.value.response.headers["retry-after"] == "1"
    told: Any = client.get(f"/decisions/{caught.value.response.headers['x-collegium-decision']}", cast_to=object)
    assert (told["error"], [c["error"] for c in told["calls"]]) == ("expert_failed", ["expert_failed"])


def test_unknown_model(client: openai.OpenAI) -> None:
    for name in ("gpt-9", "collegium/nobody", "collegium/one"):
        with pytest.raises(openai.NotFoundError, match=name) as caught:
            client.chat.completions.create(model=name, messages=ASK)
        assert caught.value.param == "model"


class StubEncoder:
    name, width = "stub", 2

    async def encode(self, texts: list[str]) -> Any:
        return np.array([[len(t), 0.5] for t in texts], dtype=np.float32)

    async def count_tokens(self, texts: list[str]) -> int:
        return sum(map(len, texts))


def listening(seen: list[Request]) -> Callable[[EngineSpec], FakeEngine]:
    """Makes fake engines that keep what they are asked."""

    class Listening(FakeEngine):
        def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
            seen.append(request)
            return super().generate(request, expert)

    return Listening
