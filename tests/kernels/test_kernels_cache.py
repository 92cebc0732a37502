"""Cache policies on traces one can follow by hand, and against brute force."""

import itertools
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from collegium_kernels.cache import ExpertCache, Now, Trace, replay
from collegium_kernels.cache_policies import (
    Belady,
    HotCold,
    LeastStale,
    Lfu,
    Lru,
    PerLayer,
    PreGated,
    adapmoe_cost,
    allocate,
    bound,
    hot_count,
    miss_curves,
    ring_stall_s,
)
from collegium_kernels.errors import KernelInputError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from evals.kernels.replay import main


def trace_of(*steps: list[list[int]], E: int = 4) -> Trace:
    return Trace(ids_SLK=torch.tensor(steps), num_experts=E)


def one_layer(ids: str, E: int = 4) -> Trace:
    return trace_of(*[[[int(c)]] for c in ids], E=E)


def random_trace(S: int = 60, L: int = 4, K: int = 2, E: int = 8, seed: int = 0) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.rand(L, E, generator=generator) ** 3 + 0.05
    ids = torch.stack([torch.multinomial(popularity, K, generator=generator) for _ in range(S)])
    return Trace(ids_SLK=ids, num_experts=E)


def test_lru_and_lfu_by_hand() -> None:
    assert replay(one_layer("010203"), Lru(), 2).hits == 2
    trace = one_layer("0001231230")
    assert replay(trace, Lru(), 2).hits == 2
    assert replay(trace, Lfu(), 2).hits == 3


@given(st.integers(0, 2**31), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_lru_equals_an_ordered_dict(seed: int, slots: int) -> None:
    trace, held, hits = random_trace(S=40, K=1, seed=seed), OrderedDict[tuple[int, int], None](), 0
    for _, layer, (expert,) in trace.needs():
        key = (layer, expert)
        hits += key in held
        held[key] = None
        held.move_to_end(key)
        if len(held) > slots:
            held.popitem(last=False)
    assert replay(trace, Lru(), slots).hits == hits


def test_hit_rate_grows_with_how_often_an_expert_is_used_again() -> None:
    rates = []
    for again in (0.0, 0.5, 0.9):
        generator, ids = torch.Generator().manual_seed(0), [0]
        for _ in range(400):
            stay = torch.rand((), generator=generator) < again
            ids.append(ids[-1] if stay else int(torch.randint(0, 8, (), generator=generator)))
        rates.append(replay(one_layer("".join(map(str, ids)), E=8), Lru(), 2).hit_rate)
    assert rates[0] < rates[1] < rates[2]


def test_belady_by_hand_and_never_beaten() -> None:
    assert replay(one_layer("0120120"), Belady(one_layer("0120120")), 2).hits == 2
    for seed in range(5):
        trace = random_trace(seed=seed)
        for slots in (4, 8, 16):
            bound = replay(trace, Belady(trace), slots).hits
            assert bound >= max(replay(trace, policy(), slots).hits for policy in (Lru, Lfu, LeastStale))


def brute_force_hits(ids: tuple[int, ...], slots: int) -> int:
    states = {frozenset[int](): 0}
    for expert in ids:
        after: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            if expert in held:
                choices = [(held, hits + 1)]
            elif len(held) < slots:
                choices = [(held | {expert}, hits)]
            else:
                choices = [(held - {out} | {expert}, hits) for out in held]
            for state, score in choices:
                after[state] = max(after.get(state, 0), score)
        states = after
    return max(states.values())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=14), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_belady_is_the_optimum(ids: list[int], slots: int) -> None:
    trace = one_layer("".join(map(str, ids)), E=5)
    assert replay(trace, Belady(trace), slots).hits == brute_force_hits(tuple(ids), slots)


def most_hits(trace: Trace, slots: int) -> int:
    """By trying every set to hold after every layer."""
    states: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    for _, layer, experts in trace.needs():
        keys, after = {(layer, e) for e in experts}, dict[frozenset[tuple[int, int]], int]()
        for held, hits in states.items():
            at_hand = sorted(held | keys)
            for kept in itertools.combinations(at_hand, min(slots, len(at_hand))):
                state = frozenset(kept)
                after[state] = max(after.get(state, 0), hits + len(keys & held))
        states = after
    return max(states.values())


@given(st.integers(0, 2**31), st.integers(0, 3), st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_no_cache_without_prefetch_passes_the_bound(seed: int, slots: int, layers: int) -> None:
    trace = random_trace(S=7, L=layers, K=2, E=4, seed=seed)
    best = bound(trace, slots)
    assert best.hits == most_hits(trace, slots)
    assert best.hits + best.misses == 7 * layers * 2
    shares = allocate(miss_curves(trace), slots)
    for policy in (Lru(), Lfu(), LeastStale(), Belady(trace), HotCold(trace, slots), PerLayer(shares)):
        assert replay(trace, policy, slots).hits <= best.hits


def test_least_stale_keeps_the_layers_to_come() -> None:
    """Three layers, the same expert each token, two slots: LRU always throws out what comes next."""
    trace = trace_of(*[[[0], [0], [0]]] * 10)
    assert replay(trace, Lru(), 2).hits == 0
    assert replay(trace, LeastStale(), 2).hits == 9


def test_who_leaves_first() -> None:
    """Least stale: of the layers to come the farthest. LFU: of equals the one used longest ago, whatever its number."""
    now = Now(step=3, layer=1, tick=13)
    stale, lfu = LeastStale(), Lfu()
    for tick, key in enumerate([(2, 0), (3, 0)]):
        stale.used(key, Now(step=0, layer=key[0], tick=tick))
    assert stale.victim([(2, 0), (3, 0)], now) == (3, 0)
    for tick, key in enumerate([(1, 5), (1, 2)]):
        lfu.used(key, Now(step=tick, layer=1, tick=tick))
    assert lfu.victim([(1, 2), (1, 5)], now) == (1, 5)


def test_hit_rate_grows_with_slots_and_is_whole_when_all_fit() -> None:
    trace = random_trace()
    rates = [replay(trace, Lru(), slots).hit_rate for slots in (2, 8, 16, 32)]
    assert rates == sorted(rates)
    cold = len({(layer, e) for _, layer, experts in trace.needs() for e in experts})
    assert replay(trace, Lru(), 32).misses == cold


def test_prefetch_of_the_right_experts_leaves_only_first_layers_to_miss() -> None:
    trace = random_trace()
    plain = replay(trace, LeastStale(), 8)
    exact = replay(trace, LeastStale(), 8, prefetcher=PreGated(trace))
    guess = replay(trace, LeastStale(), 8, prefetcher=PreGated(trace, accuracy=0.5))
    assert exact.misses <= 2 * 60
    assert exact.hit_rate > guess.hit_rate > plain.hit_rate
    assert exact.prefetched > 0
    assert exact.bytes_per_token(10) == (exact.misses + exact.prefetched) * 10 / 60


def test_experts_needed_together_do_not_evict_each_other() -> None:
    cache = ExpertCache(2, Lru())
    now = Now(step=0, layer=0, tick=0)
    assert cache.need(0, [0, 1, 2], now) == [(0, 0), (0, 1), (0, 2)]
    assert set(cache.resident) == {(0, 0), (0, 1)}
    assert cache.need(0, [0, 1], Now(step=1, layer=0, tick=1)) == []
    assert ExpertCache(0, Lru()).need(0, [3], now) == [(0, 3)]


def test_an_expert_asked_for_twice_is_loaded_once() -> None:
    """A guess may name one twice, and threw two others out for it."""
    cache, now = ExpertCache(2, Lru()), Now(step=0, layer=0, tick=0)
    cache.need(0, [0, 1], now)
    later = Now(step=1, layer=0, tick=1)
    assert cache.prefetch([(1, 3), (1, 3)], later, keep=()) == [(1, 3)]
    assert len(cache.resident) == 2
    assert cache.tally.prefetched == 1
    assert cache.need(0, [2, 2], Now(step=2, layer=0, tick=2)) == [(0, 2)]
    assert cache.tally.misses == 3


def test_allocation_equals_brute_force() -> None:
    trace = random_trace(L=3, E=5)
    curves = miss_curves(trace)
    for budget in (0, 4, 9, 15):
        found = allocate(curves, budget)
        cost = sum(curves[layer][s] for layer, s in enumerate(found))
        every = itertools.product(range(6), repeat=3)
        assert cost == pytest.approx(min(sum(curves[i][s] for i, s in enumerate(a)) for a in every if sum(a) <= budget))
        assert sum(found) <= budget


def test_measured_miss_curves_predict_the_replay() -> None:
    """Up to what a layer may borrow while the cache is not full yet."""
    trace = random_trace(K=1)
    shares = [2, 3, 1, 4]
    predicted = sum(miss_curves(trace)[layer][s] for layer, s in enumerate(shares)) * 60
    assert 0.9 * predicted <= replay(trace, PerLayer(shares), 10).misses <= predicted


def test_adapmoe_cost_of_the_card() -> None:
    wanted = [1.0, 0.795, 0.613, 0.454, 0.317, 0.204, 0.113, 0.045, 0.0]
    got = [adapmoe_cost(s, single=0.2, accuracy=0.8) for s in range(9)]
    assert got == pytest.approx(wanted, abs=6e-4)
    assert got == sorted(got, reverse=True)


@pytest.mark.parametrize(
    ("slots", "fetch", "hidden"), [(4, 3.0, True), (4, 3.1, False), (2, 1.0, True), (2, 1.5, False)]
)
def test_ring_hides_a_fetch_of_slots_less_one_layers(slots: int, fetch: float, hidden: bool) -> None:
    """The closed form t_f <= (K - 1) t_c, when a fetch may take as long as all other slots compute."""
    if fetch <= 1.0:
        assert ring_stall_s(40, slots, fetch, 1.0) == 0
    assert (ring_stall_s(slots + 1, slots, fetch, 1.0) == 0) is hidden


def test_hot_and_cold_split_is_the_best_by_enumeration() -> None:
    tokens = [100, 50, 10, 5, 1, 1, 0, 0]
    hot = hot_count(tokens, hot_s=lambda n: 8.0 if n else 0.0, cold_s=lambda n: 0.5 * n)
    slower = [max(8.0 * sum(1 for n in tokens[:h] if n), 0.5 * sum(tokens[h:])) for h in range(9)]
    assert slower[hot] == min(slower)
    assert hot == 2
    trace = one_layer("00001112")
    tally = replay(trace, HotCold(trace, 2), 2)
    assert (tally.hits, tally.misses) == (5, 3)


def test_traces_are_saved_and_bad_ids_refused(tmp_path: Path) -> None:
    trace = random_trace()
    trace.save(tmp_path / "trace.safetensors")
    loaded = Trace.load(tmp_path / "trace.safetensors")
    assert loaded.num_experts == 8
    assert torch.equal(loaded.ids_SLK, trace.ids_SLK)
    with pytest.raises(KernelInputError, match="ids in"):
        Trace(ids_SLK=torch.full((1, 1, 1), 9), num_experts=8)
    with pytest.raises(KernelInputError, match="an integer dtype"):
        Trace(ids_SLK=torch.rand(1, 1, 1), num_experts=8)
    with pytest.raises(KernelInputError, match="slots is -1"):
        ExpertCache(-1, Lru())


def test_a_file_that_is_no_trace_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    save_file({"ids_SLK": torch.zeros(1, 1, 1, dtype=torch.int32)}, tmp_path / "bare")
    for name in ("text", "other", "bare", "none"):
        with pytest.raises(KernelInputError, match=f"{name} is not a trace"):
            Trace.load(tmp_path / name)


def test_the_command_prints_every_policy_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_trace().save(tmp_path / "trace.safetensors")
    main([str(tmp_path / "trace.safetensors"), "--plot", str(tmp_path / "hits.svg")])
    out = capsys.readouterr().out
    for name in ("lru", "lfu", "least-stale", "dp-allocation", "hot-cold", "belady", "bound", "pre-gated"):
        assert name in out
    assert out.count("5%") >= 8
    assert (tmp_path / "hits.svg").read_text().startswith("<svg")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_layer("0102").save(tmp_path / "trace")
    (tmp_path / "text").write_text("no tensors")
    wrong = [
        (["none"], "there is no trace"),
        (["text"], "is not a trace"),
        (["trace", "--plot", str(tmp_path / "a.png")], "writes SVG"),
        (["trace", "--plot", str(tmp_path / "none" / "a.svg")], "there is no folder"),
        (["trace", "--expert-bytes", "0"], "must be above 0"),
    ]
    for (name, *more), words in wrong:
        with pytest.raises(SystemExit):
            main([str(tmp_path / name), *more])
        assert words in capsys.readouterr().err
