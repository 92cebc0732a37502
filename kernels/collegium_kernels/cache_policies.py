"""Eviction, allocation and prefetch for the expert cache. Each names its source.

Legend: S steps, L layers, K experts, E experts a layer.
"""

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence

from collegium_kernels.cache import Key, Now, Policy, Tally, Trace

NEVER = float("inf")


class Lru:
    """Evict what was used longest ago."""

    def __init__(self) -> None:
        self._last: dict[Key, int] = {}

    def used(self, key: Key, now: Now) -> None:
        self._last[key] = now.tick

    def victim(self, resident: Collection[Key], now: Now) -> Key:
        return min(resident, key=lambda k: (self._last[k], k))

    def admits(self, key: Key) -> bool:
        return True


class Lfu(Lru):
    """Evict what was used least often; the older of two equals."""

    def __init__(self) -> None:
        super().__init__()
        self._count: Counter[Key] = Counter()

    def used(self, key: Key, now: Now) -> None:
        super().used(key, now)
        self._count[key] += 1

    def victim(self, resident: Collection[Key], now: Now) -> Key:
        return min(resident, key=lambda k: (self._count[k], self._last[k], k))


class LeastStale(Lru):
    """What an earlier token left behind in layers this token has passed goes first, oldest first; then what this token
    has used already; the layers still to come go last, farthest first (arXiv 2602.03921; the rule as we read it)."""

    def victim(self, resident: Collection[Key], now: Now) -> Key:
        start = now.tick - now.layer

        def order(key: Key) -> tuple[int, int, Key]:
            if key[0] > now.layer:
                return 2, -key[0], key
            return int(self._last[key] >= start), self._last[key], key

        return min(resident, key=order)


class Belady(Lru):
    """Evict what is needed again the latest: the best of the policies that admit every miss.

    It has read the whole trace. A policy that leaves experts out (HotCold, PerLayer) may pass it; none ``bound``.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._future: defaultdict[Key, deque[int]] = defaultdict(deque)
        for tick, (_, layer, experts) in enumerate(trace.needs()):
            for expert in experts:
                self._future[(layer, expert)].append(tick)

    def next_use(self, key: Key, now: Now) -> float:
        uses = self._future[key]
        while uses and uses[0] <= now.tick:
            uses.popleft()
        return uses[0] if uses else NEVER

    def victim(self, resident: Collection[Key], now: Now) -> Key:
        return max(resident, key=lambda k: (self.next_use(k, now), k))


def bound(trace: Trace, slots: int) -> Tally:
    """The most hits that a cache without prefetch can have, whatever it admits: after each layer it holds, of what it
    held and what was needed, what is needed again the soonest."""
    future, held, tally = Belady(trace), set[Key](), Tally(steps=trace.ids_SLK.shape[0])
    for tick, (step, layer, experts) in enumerate(trace.needs()):
        now, keys = Now(step=step, layer=layer, tick=tick), {(layer, e) for e in experts}
        tally.hits += len(keys & held)
        tally.misses += len(keys - held)
        held = set(sorted(held | keys, key=lambda k: (future.next_use(k, now), k))[:slots])
    return tally


class PerLayer:
    """A share of the slots for each layer, as ``allocate`` gives it, with a policy inside each (AdapMoE)."""

    def __init__(self, slots_L: Sequence[int], make: Callable[[], Policy] = Lru) -> None:
        self._slots = slots_L
        self._inner = [make() for _ in slots_L]

    def used(self, key: Key, now: Now) -> None:
        self._inner[key[0]].used(key, now)

    def victim(self, resident: Collection[Key], now: Now) -> Key:
        """From the layer that is farthest over its share, else from the current one."""
        held = Counter(key[0] for key in resident)
        layer = max(held, key=lambda at: (held[at] + (at == now.layer) - self._slots[at], at == now.layer))
        return self._inner[layer].victim([k for k in resident if k[0] == layer], now)

    def admits(self, key: Key) -> bool:
        return self._slots[key[0]] > 0


class HotCold(Lru):
    """The hottest experts of a profile stay; the cold ones never enter and run where they are (MoNDE)."""

    def __init__(self, profile: Trace, slots: int) -> None:
        super().__init__()
        counts = Counter((layer, e) for _, layer, experts in profile.needs() for e in experts)
        self._hot = {key for key, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:slots]}

    def admits(self, key: Key) -> bool:
        return key in self._hot


class PreGated:
    """The gate of layer l has chosen for layer l + 1 (Pre-gated MoE); right with probability ``accuracy``."""

    def __init__(self, trace: Trace, *, accuracy: float = 1.0, seed: int = 0) -> None:
        self._ids, self._experts = trace.ids_SLK, trace.num_experts
        self._accuracy, self._random = accuracy, random.Random(seed)  # noqa: S311 - a simulation

    def predict(self, now: Now) -> Iterable[Key]:
        layer, step = (now.layer + 1) % self._ids.shape[1], now.step + (now.layer + 1 == self._ids.shape[1])
        if layer == 0 or step >= self._ids.shape[0]:
            return []
        true = [e for e in self._ids[step, layer].tolist() if e >= 0]
        wrong = self._random.random
        return [(layer, e if wrong() < self._accuracy else self._random.randrange(self._experts)) for e in true]


def allocate(cost_LS: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Slots for each layer with the least total cost. ``cost_LS[l][s]`` is what layer l costs with s slots."""
    best: list[tuple[float, list[int]]] = [(0.0, [])] * (budget + 1)
    for cost_S in cost_LS:
        best = [
            min((best[left - s][0] + cost, [*best[left - s][1], s]) for s, cost in enumerate(cost_S) if s <= left)
            for left in range(budget + 1)
        ]
    return best[budget][1]


def adapmoe_cost(slots: int, *, single: float, accuracy: float, num_experts: int = 8) -> float:
    """Expected loads of a layer a token: one expert with probability ``single``, else two; prefetch hits with
    ``accuracy`` (arXiv 2408.10284)."""
    E, out = num_experts, num_experts - slots
    both = out * (out - 1) / (E * (E - 1))
    one = 2 * out * slots / (E * (E - 1))
    late = 1 - accuracy
    return single * out / E * late + (1 - single) * (2 * both * late + both * accuracy + one * late)


def miss_curves(trace: Trace) -> list[list[float]]:
    """For each layer, LRU misses a token with 0 to E slots of its own: the costs for ``allocate``, measured."""
    curves = []
    for layer in range(trace.num_layers):
        depths: Counter[int] = Counter()
        stack: list[int] = []
        for _, at, experts in trace.needs():
            if at == layer:
                for expert in experts:
                    depths[stack.index(expert) if expert in stack else trace.num_experts] += 1
                stack = experts + [e for e in stack if e not in experts]
        steps = max(1, trace.ids_SLK.shape[0])
        curves.append([sum(c for d, c in depths.items() if d >= s) / steps for s in range(trace.num_experts + 1)])
    return curves


def ring_stall_s(num_layers: int, slots: int, fetch_s: float, compute_s: float) -> float:
    """SE-MoE's ring: layer l lives in slot l mod ``slots`` and is fetched while the others compute (arXiv 2205.10034).

    One pass with the first ``slots`` layers already there; one fetch at a time.
    """
    clock = stall = link_free = 0.0
    ready = [0.0] * slots
    for layer in range(num_layers):
        wait = max(0.0, ready[layer % slots] - clock)
        stall, clock = stall + wait, clock + wait + compute_s
        link_free = max(link_free, clock) + fetch_s
        ready[layer % slots] = link_free
    return stall


def hot_count(tokens_E: Sequence[int], *, hot_s: Callable[[int], float], cold_s: Callable[[int], float]) -> int:
    """MoNDE's split: how many of the busiest experts to run on the fast side, so that the slower side ends first."""
    ranked = sorted(tokens_E, reverse=True)

    def slower(hot: int) -> float:
        return max(sum(hot_s(n) for n in ranked[:hot]), sum(cold_s(n) for n in ranked[hot:]))

    return min(range(len(ranked) + 1), key=slower)
