"""Checks of what the config names: policies, models, keys, endpoints."""

import asyncio
import os
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from experts.endpoint import key_header, read_options
from experts.errors import ConfigError, variable
from experts.models import list_models
from orchestrator.build import build_service, make_encoder
from orchestrator.config import OpenAIConfig
from orchestrator.doctor.case import Case, Finding

TIMEOUT_S = 5


def policies(case: Case) -> Iterator[Finding]:
    """Routers, aggregators, their options and artefacts: everything is made, nothing is loaded."""
    try:
        models = build_service(case.config).policies.models
    except ConfigError as exc:
        yield Finding(check="policies", status="fail", message=exc.message, todo="correct the config")
        return
    yield Finding(check="policies", message=f"can be asked for: {', '.join(models)}")


def encoder(case: Case) -> Iterator[Finding]:
    """Which encoder is in use, and what runs it."""
    wanted = case.config.encoder
    try:
        found = make_encoder(wanted.model, 1, wanted.runtime)
    except ConfigError as exc:
        if case.needs_encoder:
            todo = "install it, or set encoder.model"
            yield Finding(check="encoder", status="fail", message=exc.message, todo=todo)
        else:
            yield Finding(check="encoder", message=f"none, and only /v1/embeddings would need one: {exc.message}")
        return
    use = "in use" if case.needs_encoder else "of use to /v1/embeddings only: no policy reads embeddings"
    yield Finding(check="encoder", message=f"{found.name} ({found.width} wide) by {found.runtime}, {use}")


def models(case: Case) -> Iterator[Finding]:
    """Bundled models are prepared or can be; folders are there."""
    prepared = {status.model.name: status.prepared for status in list_models()}
    wanted = [spec.model for spec in case.specs("vllm")] + [case.config.encoder.model] * (
        case.encoder_package != "wordllama" and case.needs_encoder
    )
    for model in dict.fromkeys(wanted):
        if not prepared.get(model, True):
            yield Finding(
                check="models",
                status="warn",
                message=f"{model} is not prepared; the first start will do it",
                todo=f"collegium models prepare {model}",
            )
        elif model.startswith((".", "/")) and not Path(model).is_dir():
            yield Finding(
                check="models",
                status="fail",
                message=f"there is no folder {model}",
                todo="correct 'model' in the config",
            )
        elif model in prepared or Path(model).is_dir():
            yield Finding(check="models", message=f"{model} is ready")
        else:
            yield Finding(check="models", message=f"{model} is not bundled: vLLM looks for it on the model hub")


def keys(case: Case) -> Iterator[Finding]:
    """Keys stand in the environment; a variable that is not set is a key that is not there."""
    security = case.config.security
    owners = {e.api_key_env: f"engine {name}" for name, e in _endpoints(case).items() if e.api_key_env}
    owners |= {key.env: f"tenant {name}" for name, key in security.api_keys.items()}
    owners |= {security.admin_key_env: "administration"} if security.admin_key_env else {}
    for name, owner in owners.items():
        if os.environ.get(name):
            yield Finding(check="keys", message=f"{name} is set, for {owner}")
        else:
            shown = variable(name)
            yield Finding(
                check="keys",
                status="fail",
                message=f"{shown} is not set, for {owner}",
                todo=f"export {shown}=..." if shown == name else "write the name of a variable there, not the key",
            )


def endpoints(case: Case) -> Iterator[Finding]:
    """Each endpoint is asked for its models, with its key; all at once."""
    yield from asyncio.run(_ask_all(_endpoints(case)))


def _endpoints(case: Case) -> Mapping[str, OpenAIConfig]:
    return {name: e for name, e in case.config.engines.items() if isinstance(e, OpenAIConfig)}


async def _ask_all(engines: Mapping[str, OpenAIConfig]) -> list[Finding]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        return await asyncio.gather(*(_ask(session, name, engine) for name, engine in engines.items()))


async def _ask(session: aiohttp.ClientSession, name: str, engine: OpenAIConfig) -> Finding:
    key = (os.environ.get(engine.api_key_env) if engine.api_key_env else None) or None
    try:
        options = read_options(engine.spec(name))
    except ConfigError as exc:
        return Finding(check="endpoints", status="fail", message=exc.message, todo="correct the config")
    base = URL(engine.base_url)
    url = (base / "models").with_query(base.query)
    headers = {**options.headers, **(key_header(options, key) if key else {})}
    try:
        async with session.get(url, headers=headers) as reply:
            body = await reply.json(content_type=None) if reply.status == HTTPStatus.OK else None
            return _judge(name, engine, reply.status, body, with_key=key is not None)
    except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
        untrusted = isinstance(exc, aiohttp.ClientConnectorCertificateError)
        return Finding(
            check="endpoints",
            status="fail",
            message=f"engine {name}: {url} cannot be reached: {str(exc) or f'no answer within {TIMEOUT_S} s'}",
            todo="name your authority's file in SSL_CERT_FILE" if untrusted else "start it, or correct base_url",
        )


def _judge(name: str, engine: OpenAIConfig, status: int, body: Any, *, with_key: bool) -> Finding:
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        key = f"the key in {engine.api_key_env}" if with_key else "a request without a key"
        return Finding(
            check="endpoints",
            status="fail",
            message=f"engine {name}: {engine.base_url} refuses {key} (HTTP {status})",
            todo=f"put a valid key into {engine.api_key_env}" if engine.api_key_env else "set api_key_env",
        )
    if status != HTTPStatus.OK:
        return Finding(
            check="endpoints",
            status="fail" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "warn",
            message=f"engine {name}: {engine.base_url}/models answers HTTP {status}",
            todo="check base_url; it usually ends in /v1",
        )
    rows = body.get("data") if isinstance(body, Mapping) else None
    known = [row.get("id") for row in rows or () if isinstance(row, Mapping)]
    if known and engine.model not in known:
        return Finding(
            check="endpoints",
            status="warn",
            message=f"engine {name}: {engine.base_url} has no model '{engine.model}'",
            todo=f"take one it has: {', '.join(map(str, known[:5]))}",
        )
    return Finding(check="endpoints", message=f"engine {name}: {engine.base_url} answers and has '{engine.model}'")
