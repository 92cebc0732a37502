"""A reward behind HTTP: a vLLM server that runs a reward model, or any scorer that speaks a small JSON contract.

api        POST           sends                                          reads
score      {base}/score     {"model", "text_1": prompt, "text_2": [answers]}   {"data": [{"index", "score"}]}
classify   {base}/classify  {"model", "input": [prompt + answer, ...]}         {"data": [{"index", "probs"}]}
plain      {base}           {"model", "prompt", "answers": [answers]}          {"scores": [numbers]}
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import aiohttp
import orjson
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from yarl import URL

from experts.base import Score
from experts.endpoint import key_headers, open_session
from experts.endpoint import read_options as read_endpoint
from experts.errors import BadRequest, CollegiumError, ConfigError, DeadlineExceeded, ExpertFailed
from experts.types import Completion, EngineSpec, Request

_ENDPOINT = ("base_url", "api_key_env", "connect_s", "read_s", "max_connections", "headers")


class HttpRewardOptions(BaseModel):
    """``base_url`` has no /v1 for vLLM's score and classify. Times in seconds, for one request with all its answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str
    api: Literal["score", "classify", "plain"] = "score"
    label: NonNegativeInt = Field(0, description="Which of the classes' numbers is the reward (classify).")
    template: str = Field("{prompt}\n{answer}", description="What a classifier reads of one answer.")
    timeout_s: PositiveFloat = 30.0
    max_answers: PositiveInt = 64
    max_chars: PositiveInt = Field(100_000, description="Of the prompt, and of each answer; longer ones are cut.")
    max_reply_bytes: PositiveInt = 2**20
    api_key_env: str | None = None
    connect_s: PositiveFloat = 5.0
    read_s: PositiveFloat = 30.0
    max_connections: NonNegativeInt = 16
    headers: dict[str, str] = {}


class HttpReward:
    """One POST a request. The session is made by the first one; aclose() ends it."""

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for unknown options and addresses that are none; asks the endpoint nothing."""
        self.name = f"http:{model}"
        self._model = model
        try:
            self._options = HttpRewardOptions.model_validate(dict(options))
        except ValidationError as exc:
            first = exc.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ConfigError(f"Reward '{self.name}': option '{key}': {first['msg']}.") from exc
        chosen = {key: getattr(self._options, key) for key in _ENDPOINT}
        self._spec = EngineSpec(engine_id=self.name, backend="openai", model=model, options=chosen)
        self._endpoint = read_endpoint(self._spec)
        api = self._options.api
        self._url = URL(self._options.base_url) if api == "plain" else URL(self._options.base_url) / api
        self._session: aiohttp.ClientSession | None = None

    async def score(self, request: Request, answers: Sequence[Completion]) -> list[Score]:
        if not answers:
            return []
        if len(answers) > self._options.max_answers:
            raise BadRequest(f"Reward '{self.name}' scores at most {self._options.max_answers} answers at once.")
        cut = self._options.max_chars
        texts = [_sendable((answer.text or "")[:cut]) for answer in answers]
        reply = await self._post(self._body(_sendable(request.question[-cut:]), texts))
        try:
            values = self._values(reply, len(texts))
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as exc:
            raise self._failed(f"its reply is not what api '{self._options.api}' promises ({exc!r})") from exc
        if bad := [i for i, value in enumerate(values) if not math.isfinite(value)]:
            raise self._failed(f"it gave NaN or infinity to answer {bad[0] + 1} of {len(values)}")
        return [Score(value=value) for value in values]

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _body(self, prompt: str, texts: Sequence[str]) -> dict[str, Any]:
        match self._options.api:
            case "score":
                return {"model": self._model, "text_1": prompt, "text_2": list(texts)}
            case "classify":
                parts = self._options.template.split("{prompt}")
                # In this order, so that a prompt that says {answer} is not filled in itself.
                filled = [prompt.join(part.replace("{answer}", text) for part in parts) for text in texts]
                return {"model": self._model, "input": filled}
            case "plain":
                return {"model": self._model, "prompt": prompt, "answers": list(texts)}

    def _values(self, reply: Any, count: int) -> list[float]:
        if self._options.api == "plain":
            values = [_number(value) for value in reply["scores"]]
        else:
            rows = sorted(reply["data"], key=lambda row: row["index"])
            if [row["index"] for row in rows] != list(range(count)):
                raise ValueError(f"{len(rows)} rows, or rows out of order, for {count} answers")
            values = [self._value(row) for row in rows]
        if len(values) != count:
            raise ValueError(f"{len(values)} scores for {count} answers")
        return values

    def _value(self, row: Mapping[str, Any]) -> float:
        return _number(row["score"] if self._options.api == "score" else row["probs"][self._options.label])

    async def _post(self, body: Mapping[str, Any]) -> Any:
        if self._session is None:
            self._session = open_session(self._endpoint, key_headers(self._spec, self._endpoint))
        try:
            async with (
                asyncio.timeout(self._options.timeout_s),
                self._session.post(self._url, data=orjson.dumps(body), allow_redirects=False) as response,
            ):
                return await self._read(response)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"Reward '{self.name}' took more than {self._options.timeout_s:g} s.") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise self._failed(f"its endpoint cannot be reached or hung up ({type(exc).__name__})") from exc

    async def _read(self, response: aiohttp.ClientResponse) -> Any:
        raw = await response.content.read(self._options.max_reply_bytes + 1)
        while len(raw) <= self._options.max_reply_bytes and (more := await response.content.readany()):
            raw += more
        if response.status != 200:
            raise self._failed(f"HTTP {response.status}", retryable=response.status >= 500, status=response.status)
        if len(raw) > self._options.max_reply_bytes:
            raise self._failed(f"its reply is longer than {self._options.max_reply_bytes} bytes")
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError as exc:
            # Where NaN stands in a reply, it is no JSON.
            raise self._failed(f"its reply is not JSON ({exc})") from exc

    def _failed(self, what: str, *, retryable: bool = True, status: int | None = None) -> CollegiumError:
        return ExpertFailed(f"Reward '{self.name}': {what}.", retryable=retryable, upstream_status=status)


def _sendable(text: str) -> str:
    """Without lone surrogates, which are no UTF-8 and so no JSON."""
    return text.encode("utf-8", "replace").decode()


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)
