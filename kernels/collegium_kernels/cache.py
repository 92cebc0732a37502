"""Which experts are in fast memory: slots, admission, eviction and prefetch, over a recorded trace or in a live layer.

Legend: S steps (tokens), L layers, K experts a step may use in a layer, E experts. A key is (layer, expert).
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from collegium_kernels.errors import KernelInputError, require
from collegium_kernels.ragged import INTEGERS

Key = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Which experts each token used: ``ids_SLK``, with -1 where a gate chose fewer than K."""

    ids_SLK: Tensor
    num_experts: int

    def __post_init__(self) -> None:
        require(self.ids_SLK.dim() == 3, "ids_SLK", self.ids_SLK, "three dimensions (steps, layers, slots)")
        require(self.ids_SLK.dtype in INTEGERS, "ids_SLK", self.ids_SLK, "an integer dtype")
        low, high = (int(v) for v in self.ids_SLK.aminmax()) if self.ids_SLK.numel() else (-1, -1)
        inside = low >= -1 and high < self.num_experts
        require(inside, "ids_SLK", self.ids_SLK, f"ids in [-1, {self.num_experts}), found {low} to {high}")

    @property
    def num_layers(self) -> int:
        return self.ids_SLK.shape[1]

    def needs(self) -> Iterator[tuple[int, int, list[int]]]:
        """(step, layer, experts) in the order of execution."""
        for step, layers in enumerate(self.ids_SLK.tolist()):
            for layer, ids in enumerate(layers):
                yield step, layer, sorted({e for e in ids if e >= 0})

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"ids_SLK": self.ids_SLK.to(torch.int32).contiguous()}, path, {"num_experts": str(self.num_experts)})

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Raises KernelInputError, with the file's name, for one that is no trace."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                ids_SLK, about = file.get_tensor("ids_SLK"), file.metadata() or {}
            return cls(ids_SLK=ids_SLK, num_experts=int(about["num_experts"]))
        except (OSError, SafetensorError, KeyError, ValueError) as exc:
            raise KernelInputError(f"{path} is not a trace that Trace.save wrote: {exc}") from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """Where execution is; ``tick`` counts layers executed since the start."""

    step: int
    layer: int
    tick: int


class Policy(Protocol):
    """Who leaves when a slot is needed. One instance serves one cache."""

    def used(self, key: Key, now: Now) -> None:
        """An expert was needed, or came by prefetch."""

    def victim(self, resident: Collection[Key], now: Now) -> Key:
        """One of ``resident``, which is never empty."""

    def admits(self, key: Key) -> bool:
        """Whether a missed expert may take a slot at all; if not, it runs where it is."""


class Prefetcher(Protocol):
    def predict(self, now: Now) -> Iterable[Key]:
        """The experts to fetch while the layer of ``now`` computes."""


@dataclass(slots=True)
class Tally:
    """What a replay counted. A prefetched expert is no miss, but its bytes are moved all the same."""

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    steps: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    def bytes_per_token(self, expert_bytes: int) -> float:
        return (self.misses + self.prefetched) * expert_bytes / max(1, self.steps)


@dataclass(slots=True)
class ExpertCache:
    """Slots with a policy. ``need`` says what must be copied before a layer runs; ``prefetch`` what to copy ahead."""

    slots: int
    policy: Policy
    tally: Tally = field(default_factory=Tally)
    resident: dict[Key, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.slots < 0:
            raise KernelInputError(f"slots is {self.slots}: it must be at least 0.")

    def need(self, layer: int, experts: Collection[int], now: Now) -> list[Key]:
        """The experts to load now. None of those needed together makes way for another."""
        keys = [(layer, e) for e in dict.fromkeys(experts)]
        missing = [key for key in keys if key not in self.resident]
        self.tally.hits += len(keys) - len(missing)
        self.tally.misses += len(missing)
        for key in keys:
            if key not in missing or self._admit(key, now, keep=set(keys)):
                self.policy.used(key, now)
        return missing

    def prefetch(self, keys: Iterable[Key], now: Now, keep: Collection[Key]) -> list[Key]:
        """The experts to load ahead. ``keep`` are in use."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self.resident]
        loaded = []
        for key in wanted:
            if self._admit(key, now, keep={*keep, *wanted}):
                self.policy.used(key, now)
                loaded.append(key)
        self.tally.prefetched += len(loaded)
        return loaded

    def _admit(self, key: Key, now: Now, *, keep: set[Key]) -> bool:
        if not self.policy.admits(key):
            return False
        if len(self.resident) >= self.slots:
            free = [k for k in self.resident if k not in keep]
            if not free:
                return False
            del self.resident[self.policy.victim(free, now)]
        self.resident[key] = None
        return True


def replay(trace: Trace, policy: Policy, slots: int, *, prefetcher: Prefetcher | None = None) -> Tally:
    """Run a trace through a cache."""
    cache = ExpertCache(slots, policy)
    for tick, (step, layer, experts) in enumerate(trace.needs()):
        now = Now(step=step, layer=layer, tick=tick)
        cache.need(layer, experts, now)
        if prefetcher is not None:
            cache.prefetch(prefetcher.predict(now), now, keep={(layer, e) for e in experts})
    cache.tally.steps = trace.ids_SLK.shape[0]
    return cache.tally
