"""The settings that are measured, and what could at best be reached in them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evals.batching.simulation import Call
from experts.fake import Speeds

PROMPT_TOKENS = 500
LARGE = Speeds(load_s=50.0, prefill_tps=5000.0, decode_tps=60.0, kv_tokens=32 * 1500)
SMALL = Speeds(load_s=5.0, unload_s=1.0, prefill_tps=5000.0, decode_tps=60.0, kv_tokens=32 * 700)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """The Symbolic-MoE setting (arXiv 2503.05641): GPQA's 198 questions, three of 16 experts of 7 to 9 billion
    parameters each, one GPU that holds one of them.

    A load of 50 s and 936 tokens at 60 a second are chosen so that one question after the other, each with its loads,
    takes the 196.9 s a question that the paper measured. 32 calls at a time are this project's guess, and low.
    """

    questions: int = 198
    top_k: int = 3
    engines: int = 16
    speeds: Speeds = LARGE
    mean_tokens: int = 936

    def calls(self, seed: int) -> list[Call]:
        """In the order of the questions. Who is asked is drawn by a Zipf law, each expert once a question."""
        rng = np.random.default_rng(seed)
        popularity = zipf(self.engines)
        rows = []
        for _ in range(self.questions):
            chosen = rng.choice(self.engines, self.top_k, replace=False, p=popularity)
            tokens = rng.integers(self.mean_tokens // 2, self.mean_tokens * 3 // 2, self.top_k)
            rows += [Call(0.0, int(e), PROMPT_TOKENS, int(n), "batch") for e, n in zip(chosen, tokens, strict=True)]
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    """Poisson arrivals over engines of unequal popularity (Zipf, exponent 1); the load changes hands often enough that
    ``max_wait_s`` can be kept."""

    engines: int = 8
    slots: int = 2
    max_wait_s: float = 60.0
    min_loaded_s: float = 10.0
    speeds: Speeds = SMALL
    mean_tokens: int = 100
    most_tokens: int = 300

    @property
    def longest_s(self) -> float:
        return self.speeds.run_s(PROMPT_TOKENS, self.most_tokens)

    def service_rate(self) -> float:
        """Calls a second of one loaded engine with all its KV cache in use."""
        tokens = PROMPT_TOKENS + self.mean_tokens
        return self.speeds.kv_tokens / tokens / self.speeds.run_s(PROMPT_TOKENS, self.mean_tokens)

    def feasible_rate(self) -> float:
        """Calls a second that could be served by a perfect schedule, all engines in turn, nobody waiting longer than
        ``max_wait_s`` for a swap to begin, as if calls were a fluid.

        A round lasts ``max_wait_s`` + one load at most. Each engine takes its load and unload from the slots' time in
        it, and one longest call: when an engine has to go, its last calls end at their own pace, with the KV cache
        emptying; what they still do is not counted. The rest is the slots' time to serve. One engine is in one slot:
        the most popular one serves at most all its round.
        """
        round_s = self.max_wait_s + self.speeds.load_s
        lost_s = self.speeds.load_s + self.speeds.unload_s + self.longest_s
        shared = self.service_rate() * max(0.0, self.slots - self.engines * lost_s / round_s)
        return min(shared, self.service_rate() * (1 - lost_s / round_s) / float(zipf(self.engines)[0]))

    def calls(self, rate: float, until_s: float, seed: int) -> Iterator[Call]:
        rng = np.random.default_rng(seed)
        popularity, now = zipf(self.engines), 0.0
        while True:
            gaps_s = rng.exponential(1 / rate, 1000).tolist()
            chosen = rng.choice(self.engines, 1000, p=popularity).tolist()
            tokens = np.minimum(rng.geometric(1 / self.mean_tokens, 1000), self.most_tokens).tolist()
            for gap_s, engine, answer in zip(gaps_s, chosen, tokens, strict=True):
                now += gap_s
                if now > until_s:
                    return
                yield Call(now, engine, PROMPT_TOKENS, answer)


def zipf(count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    weights: np.ndarray[tuple[int], np.dtype[np.float64]] = 1.0 / np.arange(1, count + 1)
    weights /= weights.sum()
    return weights
