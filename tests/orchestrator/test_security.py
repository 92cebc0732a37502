"""Keys: who may ask, for what, how often; and that nothing tells them."""

import hmac
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest

from experts.errors import ConfigError, RateLimited, Unauthorized
from orchestrator.config import ApiKey, Security
from orchestrator.log import JsonFormatter
from orchestrator.security import Bucket, KeyRing
from tests.orchestrator.served import Served, fake_config, serving

ASK: list[Any] = [{"role": "user", "content": "Ann"}]
KEYS = {
    "ANN_KEY": "sk-ann-secret",
    "BOB_KEY": "sk-bob-secret",
    "CAT_KEY": "sk-cat-secret",
    "ADMIN_KEY": "sk-admin-secret",
}
SECURITY = {
    "api_keys": {
        "ann": {"env": "ANN_KEY"},
        "bob": {"env": "BOB_KEY", "models": ["two", "collegium/turns"]},
        "cat": {"env": "CAT_KEY", "requests_per_minute": 2},
    },
    "admin_key_env": "ADMIN_KEY",
}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def served(keys: None) -> Iterator[Served]:
    with serving(fake_config({"security": SECURITY})) as running:
        yield running


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """For tests that leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        with serving(fake_config({"security": SECURITY})) as running:
            yield running


def ask(served: Served, key: str, model: str = "one") -> Any:
    with served.client(key) as client:
        return client.chat.completions.create(model=model, messages=ASK)


def status(served: Served, method: str, path: str, key: str | None, **body: Any) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return served.http.request(method, path, headers=headers, json=body or None).status_code


PRIVATE = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/route"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/one"),
    ("GET", "/v1/decisions/x"),
]


@pytest.mark.parametrize(("method", "path"), PRIVATE)
@pytest.mark.parametrize(
    "authorization",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer sk-ann",
        b"Bearer sk-ann-secret2",
        b"Bearer SK-ANN-SECRET",
        b"Basic sk-ann-secret",
        b"sk-ann-secret",
        b"Bearer sk-admin-secret",
        b"Bearer \xff\xfe\xf0\x9f\x98\x80",
        b"Bearer " + b"x" * 30_000,
        b"Bearer sk-ann-secret, Bearer sk-bob-secret",
    ],
)
def test_no_such_key(shared: Served, method: str, path: str, authorization: bytes) -> None:
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\nauthorization: ".encode()
    reply = shared.exchange(head + authorization + b"\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 401")
    assert b"www-authenticate: Bearer" in reply
    error = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")


def test_keys_open(shared: Served) -> None:
    assert ask(shared, "sk-ann-secret").choices
    with pytest.raises(openai.AuthenticationError):
        ask(shared, "sk-wrong")
    lenient = {"authorization": "bearer   sk-ann-secret"}
    assert shared.http.get("/v1/models", headers=lenient).status_code == 200


def test_what_needs_no_key(shared: Served) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert status(shared, "GET", path, None) == 200


def test_a_key_that_is_not_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANN_KEY", "clé-ключ-🔑")
    ring = KeyRing(Security(api_keys={"ann": ApiKey(env="ANN_KEY")}))
    sent = "Bearer clé-ключ-🔑".encode().decode("latin-1")  # as Starlette shows the header's bytes
    assert ring.tenant(sent).name == "ann"


def test_a_key_for_some_models_only(served: Served) -> None:
    for model in ("two", "collegium/turns"):
        assert ask(served, "sk-bob-secret", model).choices
    for model in ("one", "collegium", "collegium/default"):
        with pytest.raises(openai.PermissionDeniedError, match=model) as caught:
            ask(served, "sk-bob-secret", model)
        assert (caught.value.code, caught.value.param) == ("not_allowed", "model")
        assert status(served, "POST", "/v1/route", "sk-bob-secret", model=model, messages=ASK) == 403
        assert status(served, "GET", f"/v1/models/{model}", "sk-bob-secret") == 403
    assert status(served, "POST", "/v1/route", "sk-bob-secret", model="two", messages=ASK) == 200
    with served.client("sk-bob-secret") as client:
        assert [m.id for m in client.models.list()] == ["collegium/turns", "two"]
    with served.client("sk-ann-secret") as client:
        assert len(list(client.models.list())) == 5
    served.app.state.host.service = replace(served.service, encoder=StubEncoder)
    for model in ("collegium", "stub"):
        assert status(served, "POST", "/v1/embeddings", "sk-bob-secret", model=model, input="x") == 403
        assert status(served, "POST", "/v1/embeddings", "sk-ann-secret", model=model, input="x") == 200
    assert served.idle


def test_a_key_has_a_rate(served: Served) -> None:
    for _ in range(2):
        ask(served, "sk-cat-secret")
    with pytest.raises(openai.RateLimitError) as caught:
        ask(served, "sk-cat-secret")
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) in (29, 30)
    assert ask(served, "sk-ann-secret").choices  # nobody else's business
    assert served.engine.calls == 3


def test_decisions_are_their_tenants(shared: Served) -> None:
    mine = ask(shared, "sk-ann-secret").id
    path = f"/v1/decisions/{mine}"
    assert status(shared, "GET", path, "sk-ann-secret") == 200
    assert status(shared, "GET", path, "sk-bob-secret") == 404


def test_without_keys_everyone_may_ask() -> None:
    with serving(fake_config()) as served:
        assert ask(served, "whatever").choices
        assert status(served, "GET", "/v1/models", None) == 200
        assert status(served, "POST", "/admin/reload", "whatever") == 403  # closed, not open


def test_only_the_admin_key_administers(shared: Served) -> None:
    for key in (None, "sk-ann-secret", "sk-wrong"):
        assert status(shared, "POST", "/admin/reload", key) == 401


def test_every_comparison_takes_the_same_time(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks, every key is compared, by the function that does not stop at the first difference."""
    ring, seen, real = KeyRing(Security.model_validate(SECURITY)), [], hmac.compare_digest

    def count(a: bytes, b: bytes) -> bool:
        seen.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", count)
    for key in ("sk-ann-secret", "sk-cat-secret", "x", "y" * 10_000):
        seen.clear()
        with suppress(Unauthorized):
            ring.tenant(f"Bearer {key}")
        assert seen == [(32, 32)] * 3
    seen.clear()
    with pytest.raises(Unauthorized):
        ring.check_admin("Bearer sk-ann-secret")
    assert seen == [(32, 32)]


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_a_missing_key_is_a_mistake_of_the_config(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("ANN_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("ANN_KEY", value)
    with pytest.raises(ConfigError, match="ANN_KEY"):
        KeyRing(Security(api_keys={"ann": ApiKey(env="ANN_KEY")}))
    with pytest.raises(ConfigError, match="ANN_KEY"):
        KeyRing(Security(admin_key_env="ANN_KEY"))


def test_a_key_in_the_place_of_its_variable_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="not set") as caught:
        KeyRing(Security(admin_key_env="gsk_Abc123"))
    assert "gsk" not in repr(caught.value)


def test_one_key_for_two_is_a_mistake(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOB_KEY", KEYS["ANN_KEY"])
    with pytest.raises(ConfigError, match="same"):
        KeyRing(Security.model_validate(SECURITY))
    monkeypatch.setenv("BOB_KEY", KEYS["ADMIN_KEY"])
    with pytest.raises(ConfigError, match="same"):
        KeyRing(Security.model_validate(SECURITY))


def test_bucket() -> None:
    now = 0.0
    bucket = Bucket(60, clock=lambda: now)
    for _ in range(60):
        bucket.take()
    with pytest.raises(RateLimited) as caught:
        bucket.take()
    assert caught.value.retry_after_s == pytest.approx(1)
    now = 1.0
    bucket.take()
    with pytest.raises(RateLimited):
        bucket.take()
    now = 10_000.0  # no more than a minute's worth is saved
    for _ in range(60):
        bucket.take()
    with pytest.raises(RateLimited):
        bucket.take()


def test_keys_are_in_no_log_and_no_reply(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = []
    for key in (*KEYS.values(), "sk-wrong-secret"):
        headers = {"authorization": f"Bearer {key}"}
        for method, path in [*PRIVATE, ("POST", "/admin/reload"), ("GET", "/metrics"), ("GET", "/nothing")]:
            for body in ({"model": "one", "messages": ASK}, {"model": "one", "wrong": 1}):
                reply = served.http.request(method, path, headers=headers, json=body)
                said.append(reply.text + str(reply.headers))
    written = [JsonFormatter().format(record) for record in caplog.records]
    assert len(written) > 10
    assert not [line for line in [*said, *written, repr(served.service)] if "-secret" in line]


class StubEncoder:
    name, width = "stub", 1

    async def encode(self, texts: list[str]) -> Any:
        return np.ones((len(texts), 1), dtype=np.float32)

    async def count_tokens(self, texts: list[str]) -> int:
        return len(texts)
