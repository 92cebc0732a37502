"""An OpenAI-compatible endpoint as the config describes it, and a session that talks to it.

The key comes from the environment when the engine loads and stands in the session's headers only. Nothing else is taken
from the environment: no proxy, no netrc, no cookies.
"""

import difflib
import os
from asyncio import timeout
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp.abc import ResolveResult
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from yarl import URL

from experts.errors import ConfigError, variable
from experts.types import EngineSpec

BESIDE = ("base_url", "api_key_env")
"""Options that stand in the config beside ``options``, not in it."""


class Options(BaseModel):
    """What stands under an ``openai`` engine in the config. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str
    api_key_env: str | None = None
    connect_s: PositiveFloat = 5.0
    read_s: PositiveFloat = Field(120.0, description="The longest silence between two bytes.")
    keepalive_s: PositiveFloat = Field(4.0, description="Less than uvicorn's and vLLM's 5, so that we close first.")
    max_connections: NonNegativeInt = Field(256, description="More calls wait their turn; 0 for no limit.")
    stream: bool = Field(True, description="False for an endpoint that cannot stream: each answer comes whole.")
    headers: dict[str, str] = {}
    key_header: str = Field(
        "Authorization", min_length=1, description="Where the key goes, there as 'Bearer KEY', elsewhere bare."
    )
    rename: dict[str, str] = Field({}, description="Body keys by another name, as {max_tokens: max_completion_tokens}.")
    extra_body: dict[str, Any] = Field({}, description="Put over the body; null takes a key out.")
    max_event_bytes: PositiveInt = 2**20
    max_answer_bytes: PositiveInt = 16 * 2**20


def read_options(spec: EngineSpec) -> Options:
    try:
        options = Options.model_validate(dict(spec.options))
    except ValidationError as exc:
        raise ConfigError("\n".join(f"Engine '{spec.engine_id}': {_explain(e)}" for e in exc.errors())) from exc
    try:
        url = URL(options.base_url)
    except ValueError as exc:
        raise ConfigError(f"Engine '{spec.engine_id}': base_url is no address: {exc}.") from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"Engine '{spec.engine_id}': base_url must be an http or https address.")
    if url.user or url.password:
        raise ConfigError(f"Engine '{spec.engine_id}': put the key in api_key_env, not in base_url.")
    return options


def _explain(error: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg']}"
    known = [name for name in Options.model_fields if name not in BESIDE]
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown option '{key}'; " + (f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}.")


def key_headers(spec: EngineSpec, options: Options) -> dict[str, str]:
    """Raises ConfigError, which never shows a value: it may be the key."""
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", **options.headers}
    if options.api_key_env is not None:
        key = os.environ.get(options.api_key_env, "").strip()
        if not key:
            raise ConfigError(
                f"Engine '{spec.engine_id}': api_key_env names {variable(options.api_key_env)}, which is not set; "
                "put the endpoint's key in it, or leave api_key_env out."
            )
        headers |= key_header(options, key)
    for name, value in headers.items():
        if not (name.isascii() and value.isascii() and (name + value).isprintable()):
            raise ConfigError(f"Engine '{spec.engine_id}': header {name!r} has characters that HTTP does not allow.")
    return headers


def key_header(options: Options, key: str) -> dict[str, str]:
    """Azure, for one, wants it bare in ``api-key``."""
    name = options.key_header
    return {name: f"Bearer {key}" if name.lower() == "authorization" else key}


def open_session(options: Options, headers: dict[str, str]) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=options.max_connections,
            keepalive_timeout=options.keepalive_s,
            resolver=_PatientResolver(options.connect_s),
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=options.connect_s, sock_read=options.read_s),
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


class _PatientResolver(aiohttp.ThreadedResolver):
    """The system's, but not for ever: aiohttp's own limit on it would count the wait for a free connection too."""

    def __init__(self, limit_s: float) -> None:
        super().__init__()
        self._limit_s = limit_s

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        async with timeout(self._limit_s):
            return await super().resolve(host, port, family)
