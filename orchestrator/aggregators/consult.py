"""An expert asked by an aggregator: to write, to judge or to choose."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

from experts.base import Expert, collect
from experts.errors import ConfigError, ExpertFailed
from experts.types import Completion, Message, Request, SamplingParams

SHARE = 0.8
"""Of the time that is left. The rest is for the answer that goes out when the consulted expert gives none."""


def find_expert(experts: Mapping[str, Expert], expert_id: str | None) -> Expert:
    """Raises ConfigError."""
    if expert_id is None or expert_id not in experts:
        said = "names none" if expert_id is None else f"names '{expert_id}'"
        raise ConfigError(f"option 'expert' {said}; known experts: {', '.join(experts) or 'none'}.")
    return experts[expert_id]


def to_write(request: Request, text: str) -> Request:
    """``request`` with ``text`` where its last question stood: the conversation, the format asked for and the sampling
    stay. Without tools, for what is quoted in ``text`` must not call any."""
    return replace(
        request,
        messages=_restated(request.messages, text),
        prompt=None,
        tools=(),
        tool_choice=None,
        params=replace(request.params, n=1),
        stream=False,
    )


def to_judge(request: Request, text: str, *, max_tokens: int) -> Request:
    """A question about answers: nothing but ``text``, without sampling."""
    return replace(
        request,
        messages=(Message(role="user", content=text),),
        prompt=None,
        tools=(),
        tool_choice=None,
        response_format=None,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=request.params.seed),
        stream=False,
    )


async def consult(expert: Expert, request: Request) -> Completion:
    """``expert``'s answer, within ``SHARE`` of the time that is left. Raises a CollegiumError."""
    left_s = max(0.0, request.expires_s - time.monotonic())
    try:
        async with asyncio.timeout(SHARE * left_s) as limit:
            return await collect(expert.generate(request), request)
    except TimeoutError as exc:
        if not limit.expired():
            raise
        raise ExpertFailed(f"Expert '{expert.spec.expert_id}' took too long.", retryable=False) from exc


def _restated(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    last = next((i for i in reversed(range(len(messages))) if messages[i].role == "user"), None)
    said = Message(role="user", content=text)
    if last is None:
        return (*messages, said)
    # Whatever follows the question (tool calls and what they gave) stays before its new wording.
    return (*messages[:last], *messages[last + 1 :], said)
