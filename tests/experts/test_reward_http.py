"""A reward over HTTP: each contract, and each way an endpoint can fail."""

import asyncio

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from experts.errors import BadRequest, ConfigError, DeadlineExceeded, ExpertFailed
from experts.reward_http import HttpReward
from experts.types import Completion, Message, Request

ASKED = Request(messages=(Message(role="user", content="What is red?"),))
ANSWERS = [Completion(request_id="r", expert_id=e, text=t) for e, t in (("a", "Blood."), ("b", ""))]


@pytest.fixture
async def serve():
    """serve(handler) -> the base URL; serve(text) answers with it."""
    servers = []

    async def start(answer):
        async def handle(request):
            return web.Response(text=answer, content_type="application/json")

        app = web.Application()
        app.router.add_post("/{any:.*}", handle if isinstance(answer, str) else answer)
        servers.append(TestServer(app))
        await servers[-1].start_server()
        return str(servers[-1].make_url("/")).rstrip("/")

    yield start
    for server in servers:
        await server.close()


async def score(base_url, answers=ANSWERS, **options):
    reward = HttpReward("judge", {"base_url": base_url, **options})
    try:
        return [s.value for s in await reward.score(ASKED, answers)]
    finally:
        await reward.aclose()


@pytest.mark.parametrize(
    ("api", "path", "reply", "sent"),
    [
        (
            "score",
            "/score",
            {"data": [{"index": 1, "score": 0.5}, {"index": 0, "score": 2}]},
            {"model": "judge", "text_1": "What is red?", "text_2": ["Blood.", ""]},
        ),
        (
            "classify",
            "/classify",
            {"data": [{"index": 0, "probs": [0, 2]}, {"index": 1, "probs": [0, 0.5]}]},
            {"model": "judge", "input": ["What is red?\nBlood.", "What is red?\n"]},
        ),
        (
            "plain",
            "/",
            {"scores": [2, 0.5]},
            {"model": "judge", "prompt": "What is red?", "answers": ["Blood.", ""]},
        ),
    ],
)
async def test_each_contract(serve, api, path, reply, sent):
    seen = []

    async def handle(request):
        seen.append((request.path, await request.json()))
        return web.json_response(reply)

    assert await score(await serve(handle), api=api, label=1 if api == "classify" else 0) == [2, 0.5]
    assert seen == [(path, sent)]


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        ('{"scores": [NaN, 1]}', "not JSON"),
        ('{"scores": [1e999, 1]}', "infinity|not JSON"),
        ('{"scores": [1]}', "1 scores for 2 answers"),
        ('{"scores": [1, "2"]}', "no number"),
        ('{"scores": [1, null]}', "no number"),
        ('{"scores": [true, 1]}', "no number"),
        ("[]", "promises"),
        ("", "not JSON"),
        ("<html>", "not JSON"),
        ("[" * 2000, "not JSON"),
        ('{"scores": [' + "1," * 900_000 + "1]}", "longer than"),
    ],
)
async def test_a_reply_that_cannot_be_used_is_refused(serve, reply, match):
    with pytest.raises(ExpertFailed, match=match):
        await score(await serve(reply), api="plain")


async def test_rows_out_of_order_or_missing_are_refused(serve):
    with pytest.raises(ExpertFailed, match="rows"):
        await score(await serve('{"data": [{"index": 0, "score": 1}, {"index": 0, "score": 1}]}'))


@pytest.mark.parametrize(("status", "retryable"), [(500, True), (503, True), (400, False), (301, False)])
async def test_a_status_says_whether_to_ask_again(serve, status, retryable):
    async def handle(request):
        return web.Response(status=status, text="no")

    with pytest.raises(ExpertFailed, match=f"HTTP {status}") as caught:
        await score(await serve(handle))
    assert caught.value.retryable is retryable


async def test_a_hang_ends_at_the_limit(serve):
    async def handle(request):
        await asyncio.sleep(5)

    with pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
        await score(await serve(handle), timeout_s=0.1)


async def test_nobody_there_and_hanging_up(serve):
    async def handle(request):
        request.transport.close()

    with pytest.raises(ExpertFailed, match="cannot be reached or hung up") as caught:
        await score(await serve(handle))
    assert isinstance(caught.value.__cause__, aiohttp.ClientError)
    with pytest.raises(ExpertFailed, match="cannot be reached"):
        await score("http://127.0.0.1:9")


async def test_limits(serve):
    seen = []

    async def handle(request):
        seen.append(await request.json())
        return web.json_response({"scores": [1]})

    url = await serve(handle)
    long = [Completion(request_id="r", expert_id="a", text="x" * 1000)]
    assert await score(url, long, api="plain", max_chars=10) == [1]
    assert seen[0]["answers"] == ["x" * 10]
    with pytest.raises(BadRequest, match="at most 1"):
        await score(url, ANSWERS, max_answers=1)
    assert await score(url, []) == []


async def test_the_key_comes_from_the_environment(serve, monkeypatch):
    seen = []

    async def handle(request):
        seen.append(request.headers["Authorization"])
        return web.json_response({"scores": [1, 2]})

    url = await serve(handle)
    with pytest.raises(ConfigError, match="JUDGE_KEY"):
        await score(url, api="plain", api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    await score(url, api="plain", api_key_env="JUDGE_KEY")
    assert seen == ["Bearer secret"]


@pytest.mark.parametrize("options", [{}, {"base_url": "http://x", "api": "guess"}, {"base_url": "http://u:p@x"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError):
        HttpReward("judge", options)


async def test_lone_surrogates_are_no_reason_to_fail(serve):
    answers = [Completion(request_id="r", expert_id="a", text="Blood \ud800.")]
    seen = []

    async def handle(request):
        seen.append(await request.json())
        return web.json_response({"scores": [1]})

    assert await score(await serve(handle), answers, api="plain") == [1]
    assert seen[0]["answers"] == ["Blood ?."]


async def test_a_prompt_that_looks_like_the_template_is_not_filled_in():
    reward = HttpReward("judge", {"base_url": "http://localhost", "api": "classify"})
    assert reward._body("what of {answer}?", ["this"])["input"] == ["what of {answer}?\nthis"]
