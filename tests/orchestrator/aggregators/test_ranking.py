"""The relaxed comparison sort beside sorts that trust every comparison (the TradExpert card's own tests)."""

import asyncio
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import kendalltau

from orchestrator.aggregators.ranking import Ranking, rank_all_pairs

Beats = Callable[[int, int], bool]


def rank(items: int, outcome: Callable[[int, int], float | None], ties: tuple[float, ...] = ()) -> Ranking:
    async def compare(first: int, second: int) -> float | None:
        await asyncio.sleep(0)
        return outcome(first, second)

    return asyncio.run(rank_all_pairs(items, compare, at_once=4, ties=ties))


def noisy(scores: np.ndarray, rng: np.random.Generator) -> Beats:
    """Right with probability sigma(4 |difference|); in one case of ten, whoever is shown first wins."""

    def beats(first: int, second: int) -> bool:
        if rng.random() < 0.1:
            return True
        right = rng.random() < 1 / (1 + math.exp(-4 * abs(scores[first] - scores[second])))
        return bool((scores[first] > scores[second]) == right)

    return beats


def bubble(items: int, beats: Beats) -> list[int]:
    order = list(range(items))
    for end in range(items - 1, 0, -1):
        for i in range(end):
            if not beats(order[i], order[i + 1]):
                order[i], order[i + 1] = order[i + 1], order[i]
    return order


def merge(items: list[int], beats: Beats) -> list[int]:
    if len(items) < 2:
        return items
    middle, merged = len(items) // 2, []
    left, right = merge(items[:middle], beats), merge(items[middle:], beats)
    while left and right:
        merged.append((left if beats(left[0], right[0]) else right).pop(0))
    return [*merged, *left, *right]


def agreement(order: list[int] | tuple[int, ...], scores: np.ndarray) -> float:
    places = np.empty(len(order))
    places[list(order)] = np.arange(len(order), 0, -1)
    return float(kendalltau(places, scores).statistic)


def test_all_pairs_outdo_sorts_that_trust_each_comparison() -> None:
    taus: dict[str, list[float]] = {"all pairs": [], "bubble": [], "merge": []}
    for seed in range(50):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=20)
        beats = noisy(scores, rng)
        taus["all pairs"].append(agreement(rank(20, beats).order, scores))
        taus["bubble"].append(agreement(bubble(20, beats), scores))
        taus["merge"].append(agreement(merge(list(range(20)), beats), scores))
    mean = {name: float(np.mean(values)) for name, values in taus.items()}
    assert mean["all pairs"] == pytest.approx(0.88, abs=0.03)
    assert mean["bubble"] == pytest.approx(0.75, abs=0.03)
    assert mean["merge"] == pytest.approx(0.68, abs=0.03)


def test_a_comparator_that_is_right_gives_the_order() -> None:
    scores = np.random.default_rng(0).normal(size=12)
    ranking = rank(12, lambda a, b: float(scores[a] > scores[b]))
    assert agreement(ranking.order, scores) == pytest.approx(1)
    assert ranking.wins == tuple(2.0 * np.sum(scores[i] > scores) for i in range(12))


def test_rock_paper_scissors_is_a_tie_in_a_fixed_order() -> None:
    def cyclic(first: int, second: int) -> float:
        return float((first - second) % 3 == 1)

    assert rank(3, cyclic) == Ranking(order=(0, 1, 2), wins=(2.0, 2.0, 2.0), unsaid=0)
    assert rank(3, cyclic, ties=(0.1, 0.3, 0.2)).order == (1, 2, 0)


def test_a_comparator_that_only_sees_places_makes_all_equal() -> None:
    assert rank(4, lambda *_: 1.0) == Ranking(order=(0, 1, 2, 3), wins=(3.0,) * 4, unsaid=0)


def test_what_nobody_can_say_is_a_tie() -> None:
    assert rank(3, lambda a, b: None if {a, b} == {0, 1} else float(a < b)) == Ranking(
        order=(0, 1, 2), wins=(3.0, 3.0, 0.0), unsaid=2
    )


@pytest.mark.parametrize("items", [0, 1])
def test_nothing_to_compare(items: int) -> None:
    assert rank(items, lambda *_: pytest.fail("asked")).order == tuple(range(items))


@pytest.mark.parametrize("at_once", [1, 3, 99])
def test_n_times_n_minus_one_comparisons_and_never_more_than_allowed_at_once(at_once: int) -> None:
    running, most, asked = 0, 0, []

    async def compare(first: int, second: int) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        asked.append((first, second))
        await asyncio.sleep(0)
        running -= 1
        return 0.5

    asyncio.run(rank_all_pairs(5, compare, at_once=at_once))
    assert len(set(asked)) == len(asked) == 20
    assert most == min(at_once, 20)


def test_a_comparator_that_breaks_ends_all() -> None:
    def outcome(first: int, second: int) -> float:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        rank(4, outcome)
