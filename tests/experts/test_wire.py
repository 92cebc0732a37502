"""OpenAI's wire format, both ways: what leaves is complete and lean, what comes is read or refused, never misread."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import BadRequest, CollegiumError, ContextLengthExceeded, ExpertFailed
from experts.types import Chunk, ExpertSpec, Message, Request, SamplingParams, Usage
from experts.wire import read_error, read_event, request_body

EXPERT = ExpertSpec(expert_id="tutor", engine_id="gpt")


def choice(**fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, **fields}]}


class TestBody:
    def test_what_is_unset_is_left_out(self) -> None:
        body = request_body(Request(messages=(Message(role="user", content="hi"),)), "m")
        assert body == {
            "model": "m",
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": "hi"}],
        }

    def test_everything_that_is_set_arrives(self) -> None:
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        request = Request(
            messages=(
                Message(role="assistant", tool_calls=(call,)),
                Message(role="tool", content="4", tool_call_id="c1", name="f"),
            ),
            params=SamplingParams(
                temperature=0.0,
                top_p=0.5,
                max_tokens=7,
                stop=("x",),
                seed=0,
                n=2,
                logprobs=0,
                presence_penalty=0.0,
                frequency_penalty=-1.0,
                more={"top_k": 5, "seed": "not this one"},
            ),
            tools=({"type": "function"},),
            tool_choice="none",
            response_format={"type": "json_object"},
        )
        body = request_body(request, "m")
        assert body["top_k"] == 5
        assert body["messages"] == [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4", "name": "f", "tool_call_id": "c1"},
        ]
        sent = {key: body[key] for key in ("temperature", "top_p", "max_tokens", "stop", "seed", "n")}
        assert sent == {"temperature": 0.0, "top_p": 0.5, "max_tokens": 7, "stop": ["x"], "seed": 0, "n": 2}
        assert (body["logprobs"], body["top_logprobs"]) == (True, 0)
        assert (body["presence_penalty"], body["frequency_penalty"]) == (0.0, -1.0)
        assert (body["tools"], body["tool_choice"]) == ([{"type": "function"}], "none")
        assert body["response_format"] == {"type": "json_object"}

    def test_a_prompt_goes_as_it_stands(self) -> None:
        body = request_body(Request(prompt="Once", params=SamplingParams(logprobs=3)), "m")
        assert body["prompt"] == "Once"
        assert body["logprobs"] == 3
        assert "messages" not in body
        assert "top_logprobs" not in body


class TestEvents:
    @pytest.mark.parametrize(
        ("event", "expected"),
        [
            (choice(delta={"content": "hi"}), Chunk(expert_id="tutor", text="hi")),
            (choice(text="hi"), Chunk(expert_id="tutor", text="hi")),
            (choice(delta={"refusal": "no"}), Chunk(expert_id="tutor", text="no", refused=True)),
            (choice(delta={"reasoning_content": "hm"}), Chunk(expert_id="tutor", reasoning="hm")),
            (choice(delta={"reasoning": "hm"}), Chunk(expert_id="tutor", reasoning="hm")),
            (choice(delta={"reasoning": [{"no": "text"}]}), Chunk(expert_id="tutor")),
            (choice(delta={}, finish_reason="length"), Chunk(expert_id="tutor", finish_reason="length")),
            (
                choice(delta=None, finish_reason="content_filter"),
                Chunk(expert_id="tutor", finish_reason="content_filter"),
            ),
            (choice(delta=None, finish_reason="eos"), Chunk(expert_id="tutor", finish_reason="stop")),
            (
                choice(delta={"tool_calls": [{"id": "c1"}]}),
                Chunk(expert_id="tutor", tool_calls=({"id": "c1"},)),
            ),
            (
                choice(message={"content": None, "tool_calls": [{"id": "a"}, {"id": "b"}]}, finish_reason="tool_calls"),
                Chunk(
                    expert_id="tutor",
                    tool_calls=({"index": 0, "id": "a"}, {"index": 1, "id": "b"}),
                    finish_reason="tool_calls",
                ),
            ),
            (
                choice(delta={"content": "a"}, logprobs={"content": [1]}),
                Chunk(expert_id="tutor", text="a", logprobs={"content": [1]}),
            ),
            ({"choices": [{"index": 1, "delta": {"content": "b"}}]}, Chunk(expert_id="tutor", text="b", index=1)),
            (
                {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": None}},
                Chunk(expert_id="tutor", usage=Usage(prompt_tokens=3)),
            ),
        ],
    )
    def test_one_chunk_for_what_says_something(self, event: dict[str, object], expected: Chunk) -> None:
        assert list(read_event(event, EXPERT)) == [expected]

    @pytest.mark.parametrize("event", [choice(delta={"role": "assistant", "content": ""}), {"choices": []}, {}])
    def test_what_says_nothing_is_passed_over(self, event: dict[str, object]) -> None:
        assert list(read_event(event, EXPERT)) == []

    def test_a_whole_answer_gives_its_choices_and_its_usage(self) -> None:
        whole = {
            "choices": [
                {"index": 0, "message": {"content": "a"}, "finish_reason": "stop"},
                {"index": 1, "message": {"content": "b"}, "finish_reason": "length"},
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2},
            "error": None,
        }
        first, second, last = read_event(whole, EXPERT)
        assert (first.text, first.finish_reason) == ("a", "stop")
        assert (second.text, second.index, second.finish_reason) == ("b", 1, "length")
        assert last.usage == Usage(prompt_tokens=1, completion_tokens=2)

    @pytest.mark.parametrize("reason", ["error", "abort"])
    def test_an_answer_that_was_cut_is_no_answer(self, reason: str) -> None:
        with pytest.raises(ExpertFailed, match="broke off"):
            read_event(choice(delta={}, finish_reason=reason), EXPERT)

    @pytest.mark.parametrize(
        "event",
        [
            {"error": {"message": "out of memory", "code": 503}},
            {"object": "error", "message": "out of memory", "code": 503},
            {"error": {"message": "out of memory", "code": 503}, "choices": [{"finish_reason": "error"}]},
        ],
    )
    def test_an_error_in_the_stream_is_raised(self, event: dict[str, object]) -> None:
        with pytest.raises(ExpertFailed, match="out of memory") as caught:
            read_event(event, EXPERT)
        assert caught.value.upstream_status == 503

    @pytest.mark.parametrize(
        "event",
        [[], "text", 7, None, {"choices": 5}, {"choices": ["x"]}, choice(delta="x"), choice(delta={"content": [1]})],
    )
    def test_what_is_not_openais_format_is_the_experts_failure(self, event: object) -> None:
        with pytest.raises(ExpertFailed, match=r"tutor.*not OpenAI's format"):
            read_event(event, EXPERT)  # type: ignore[arg-type]

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            "choices",
                            "delta",
                            "message",
                            "content",
                            "tool_calls",
                            "finish_reason",
                            "usage",
                            "error",
                            "index",
                        ]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        )
    )
    def test_whatever_comes_is_read_or_refused(self, event: object) -> None:
        try:
            chunks = read_event(event, EXPERT)  # type: ignore[arg-type]
        except CollegiumError:
            return
        assert all(isinstance(chunk.text, str) for chunk in chunks)


class TestErrors:
    @pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
    def test_what_may_pass_is_retryable(self, status: int) -> None:
        error = read_error(status, {"error": {"message": "busy"}}, EXPERT, 7.0)
        assert isinstance(error, ExpertFailed)
        assert error.retryable
        assert (error.upstream_status, error.retry_after_s) == (status, 7.0)
        assert "busy" in error.message

    @pytest.mark.parametrize("status", [301, 402, 404, 405, 410])
    def test_what_will_not_pass_is_not(self, status: int) -> None:
        error = read_error(status, "gone", EXPERT)
        assert isinstance(error, ExpertFailed)
        assert not error.retryable

    @pytest.mark.parametrize("status", [401, 403])
    def test_words_about_our_key_stay_here(self, status: int) -> None:
        error = read_error(status, {"error": {"message": "Incorrect API key provided: sk-secret"}}, EXPERT)
        assert isinstance(error, ExpertFailed)
        assert "sk-secret" not in error.message
        assert "api_key_env" in error.message

    @pytest.mark.parametrize("status", [400, 413, 422])
    def test_a_bad_request_is_the_callers(self, status: int) -> None:
        error = read_error(status, {"error": {"message": "temperature must be below 2"}}, EXPERT)
        assert isinstance(error, BadRequest)
        assert not error.fallback
        assert "temperature must be below 2" in error.message

    @pytest.mark.parametrize(
        ("message", "lengths"),
        [
            (
                "This model's maximum context length is 4097 tokens. However, your messages resulted in 5000 tokens.",
                (4097, 5000),
            ),
            (
                "This model's maximum context length is 64 tokens. However, your prompt contains at least 80 input "
                "tokens.",
                (64, 80),
            ),
            (
                "This model's maximum context length is 64 tokens. However, you requested 10 output tokens and your "
                "prompt contains at least 55 input tokens.",
                (64, 55),
            ),
            (
                "This model's maximum context length is 4097 tokens, however you requested 5000 tokens (4000 in your "
                "prompt; 1000 for the completion).",
                (4097, 5000),
            ),
        ],
    )
    def test_a_prompt_too_long_for_this_expert_may_suit_another(self, message: str, lengths: tuple[int, int]) -> None:
        error = read_error(400, {"error": {"message": message}}, EXPERT)
        assert isinstance(error, ContextLengthExceeded)
        assert error.fallback
        assert (error.context_length, error.prompt_tokens) == lengths

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("<html><head><title>502 Bad Gateway</title></head>", "a web page, '502 Bad Gateway'"),
            ("<html>", "a web page"),
            ("", "no reason given"),
            (None, "no reason given"),
            ({"error": "just\n text"}, "just text"),
            ({"detail": "elsewhere"}, "elsewhere"),
            ({"message": "top level"}, "top level"),
            ("x" * 5000, "x" * 500),
        ],
    )
    def test_every_kind_of_body_gives_words(self, body: object, words: str) -> None:
        message = read_error(502, body, EXPERT).message
        assert words in message
        assert len(message) < 600
