"""Which engines are loaded, and how one comes and goes."""

import time
from collections.abc import Mapping, Sequence
from typing import Literal

from experts.base import Engine

State = Literal["absent", "loading", "ready", "draining", "failed"]
ALWAYS = ("openai", "recorded", "serve")
"""Backends whose engines are always there and take no slot: nothing of theirs lies in this machine's memory."""


class Residency:
    """Loads and unloads ``engines``, at most ``slots`` of them at a time; None: all of them are there all the time."""

    def __init__(self, engines: Mapping[str, Engine], *, slots: int | None = None) -> None:
        self.engines = engines
        self.slots = slots
        self.states: dict[str, State] = {e: "ready" if self.always(e) else "absent" for e in engines}
        self.loads = dict.fromkeys(engines, 0)
        self.load_s = dict.fromkeys(engines, 0.0)

    def always(self, engine_id: str) -> bool:
        return self.slots is None or self.engines[engine_id].spec.backend in ALWAYS

    def resident(self) -> Sequence[str]:
        """The engines that take a slot now."""
        return [e for e, s in self.states.items() if s in ("loading", "ready", "draining") and not self.always(e)]

    async def load(self, engine_id: str) -> None:
        """Raises what the engine raises; it is absent then."""
        self.states[engine_id] = "loading"
        started = time.monotonic()
        try:
            await self.engines[engine_id].load()
        except BaseException:
            self.states[engine_id] = "absent"
            raise
        self.loads[engine_id] += 1
        self.load_s[engine_id] += time.monotonic() - started
        self.states[engine_id] = "ready"

    async def unload(self, engine_id: str) -> None:
        self.states[engine_id] = "draining"
        await self.engines[engine_id].unload()
        self.states[engine_id] = "absent"
