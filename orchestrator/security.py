"""Who may ask, for what, how often."""

import hashlib
import hmac
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from experts.errors import ConfigError, Forbidden, RateLimited, Unauthorized, variable
from orchestrator.config import ApiKey, Security


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A caller. ``models`` empty: may ask for every model."""

    name: str | None
    models: frozenset[str] = frozenset()

    def may_ask(self, model: str) -> bool:
        return not self.models or model in self.models

    def check(self, model: str) -> None:
        """Raises Forbidden."""
        if not self.may_ask(model):
            raise Forbidden(f"This API key may not ask for '{model}'.", param="model")


ANYONE = Tenant(name=None)


class Bucket:
    """A token bucket: ``per_minute`` requests a minute, saved up to one minute's worth."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = float(per_minute)
        self._per_s = per_minute / 60
        self._clock = clock
        self._tokens = self._capacity
        self._at = clock()

    def take(self) -> None:
        """Raises RateLimited with the seconds until the next token."""
        now = self._clock()
        self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens < 1:
            wait_s = (1 - self._tokens) / self._per_s
            raise RateLimited(f"Too many requests; the next is welcome in {wait_s:.1f} s.", retry_after_s=wait_s)
        self._tokens -= 1


class KeyRing:
    """The keys of a config. Only their digests are kept.

    Raises ConfigError when a key's environment variable is unset or empty (a service that meant to ask for keys must
    not start open), and when two have the same key.
    """

    def __init__(self, security: Security) -> None:
        rows = [(name, key, _digest(_read(key.env))) for name, key in security.api_keys.items()]
        self._tenants = [(digest, Tenant(name=name, models=frozenset(key.models))) for name, key, digest in rows]
        self._buckets = {name: _bucket(key) for name, key, _ in rows}
        self._admin = None if security.admin_key_env is None else _digest(_read(security.admin_key_env))
        digests = [digest for digest, _ in self._tenants] + ([self._admin] if self._admin else [])
        if len(set(digests)) < len(digests):
            raise ConfigError("security: two of the keys are the same; nobody could tell who asks.")

    def tenant(self, authorization: str | None) -> Tenant:
        """Who sent the header ``Authorization: Bearer KEY``. Raises Unauthorized or RateLimited."""
        if not self._tenants:
            return ANYONE
        given = _digest(_bearer(authorization))
        found = None
        for digest, tenant in self._tenants:  # all of them, so that time tells nothing
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is None:
            raise Unauthorized("This API key is not known here. Send 'Authorization: Bearer KEY'.")
        if (bucket := self._buckets[str(found.name)]) is not None:
            bucket.take()
        return found

    def named(self, name: str | None) -> Tenant:
        """Who goes by ``name`` now. Raises Unauthorized where that key was taken out of the config."""
        if name is None and not self._tenants:
            return ANYONE
        for _, tenant in self._tenants:
            if tenant.name == name:
                return tenant
        raise Unauthorized(f"The API key of '{name}' is not known here any more.")

    def check_admin(self, authorization: str | None) -> None:
        """Raises Forbidden where no admin key is configured, Unauthorized where another one is given."""
        if self._admin is None:
            raise Forbidden("Administration is closed; security.admin_key_env opens it.")
        if not hmac.compare_digest(self._admin, _digest(_bearer(authorization))):
            raise Unauthorized("This is not the admin key.")


def _bucket(key: ApiKey) -> Bucket | None:
    return None if key.requests_per_minute is None else Bucket(key.requests_per_minute)


def _read(env: str) -> bytes:
    value = os.environ.get(env, "").strip()
    if not value:
        raise ConfigError(f"security: {variable(env)} is to hold a key, but is not set; put the key there.")
    return os.fsencode(value)


def _bearer(authorization: str | None) -> bytes:
    """The key as it was sent: HTTP's headers are bytes, which Starlette shows as Latin-1."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
