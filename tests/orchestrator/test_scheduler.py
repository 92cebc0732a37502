"""The scheduler's bookkeeping and policy, driven step by step on a clock of the test's own."""

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.batching.simulation import Call, Simulation
from experts.errors import QueueFull, Unavailable
from experts.fake import Speeds
from orchestrator.scheduler import EngineQueue, Scheduler, Ticket
from orchestrator.swaps import BATCH_PATIENCE, EngineView, Rules, choose

ENGINES = 5


class Watched(Simulation):
    """Checks after every step what must never happen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.most = 0

    def step(self) -> None:
        super().step()
        holding = [e.queue.view for e in self.engines if e.queue.view.holds]
        assert len(holding) <= (self.scheduler.rules.slots or math.inf)
        assert sum(v.memory_gib for v in holding) <= (self.scheduler.rules.memory_gib or math.inf) or len(holding) == 1
        for engine in self.engines:
            view = engine.queue.view
            running = view.running_online + view.running_batch
            assert running >= 0
            assert running == 0 or view.state in ("ready", "draining"), "unloaded under a call"
            assert view.state != "ready" or view.online + view.batch == 0, "waits for an engine that is ready"
        self.most = max(self.most, len(holding))


calls = st.lists(
    st.builds(
        Call,
        st.floats(0, 200),
        st.integers(0, ENGINES - 1),
        st.just(10),
        st.integers(1, 100),
        st.sampled_from(["online", "batch"]),
    ),
    min_size=1,
    max_size=60,
).map(sorted)
speeds = st.builds(
    Speeds,
    load_s=st.floats(0.1, 20),
    unload_s=st.floats(0, 5),
    decode_tps=st.floats(10, 100),
    kv_tokens=st.sampled_from([50, 1000, math.inf]),
    memory_gib=st.floats(0, 4),
)
rules = st.builds(
    Rules,
    slots=st.integers(1, 3) | st.none(),
    memory_gib=st.floats(1, 10),
    max_wait_s=st.floats(0, 60),
    min_loaded_s=st.floats(0, 30),
)


@settings(max_examples=150, deadline=None)
@given(calls, st.lists(speeds, min_size=ENGINES, max_size=ENGINES), rules)
def test_nothing_is_lost_and_nothing_answered_twice(calls: list[Call], speeds: list[Speeds], rules: Rules) -> None:
    simulation = Watched(Scheduler(rules), speeds)
    outcome = simulation.run(iter(calls))
    assert Counter(outcome.calls) == Counter(calls)
    assert simulation.scheduler.waiting == 0
    assert all(not (e.queue.view.running_online or e.queue.view.running_batch) for e in simulation.engines)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 300), st.integers(0, ENGINES - 1)), min_size=1, max_size=80), st.integers(1, 2))
def test_nobody_waits_longer_than_max_wait_and_one_load_where_the_slots_can_turn_over_in_time(
    arrivals: list[tuple[float, int]], slots: int
) -> None:
    speeds = Speeds(load_s=4.0, unload_s=0.5, decode_tps=10.0)  # a call takes 2 s
    swap_s = 1.25 * 6.5
    patience_s = (math.ceil((ENGINES - slots) / slots) + 1) * swap_s
    scheduler = Scheduler(Rules(slots=slots, max_wait_s=patience_s, min_loaded_s=10.0))
    simulation = Watched(scheduler, [speeds] * ENGINES)
    for engine in simulation.engines:  # measured before
        engine.queue.view.run_s, engine.queue.view.unload_s = 2.0, 0.5
    outcome = simulation.run(Call(at_s, engine, 0, 20) for at_s, engine in sorted(arrivals))
    assert max(outcome.wait_s) <= patience_s + 4.0 + 1e-6


def test_batches_are_grouped_and_each_engine_loaded_once_whatever_the_order() -> None:
    rows = [Call(i * 0.01, i % ENGINES, 0, 20, "batch") for i in range(200)]
    for slots in (1, 2):
        outcome = Watched(Scheduler(Rules(slots=slots)), [Speeds(load_s=9.0, decode_tps=10.0)] * ENGINES).run(
            iter(rows)
        )
        assert outcome.loads == ENGINES


def test_a_b_a_a_c_a_b_c_becomes_aaaa_bb_cc() -> None:
    rows = [Call(i * 0.01, "ABC".index(name), 0, 20) for i, name in enumerate("ABAACABC")]
    rules = Rules(slots=1, max_wait_s=60.0, min_loaded_s=0.0)
    outcome = Watched(Scheduler(rules), [Speeds(load_s=3.0, decode_tps=10.0)] * 3).run(iter(rows))
    assert [call.engine for call in outcome.calls] == [0, 0, 0, 0, 1, 1, 2, 2]


def test_online_calls_go_before_batches_and_batches_are_not_starved() -> None:
    """One slot; a caller of engine 1 every second, for ever; a batch waits for engine 0."""
    rules = Rules(slots=1, max_wait_s=5.0, min_loaded_s=2.0)
    online = [Call(float(i), 1, 0, 5) for i in range(200)]
    rows = sorted([*online, Call(0.5, 0, 0, 20, "batch")])
    outcome = Watched(Scheduler(rules), [Speeds(load_s=1.0, decode_tps=10.0)] * 2).run(iter(rows))
    ends = {c: c.arrival_s + latency_s for c, latency_s in zip(outcome.calls, outcome.latency_s, strict=True)}
    batch_s = next(end for c, end in ends.items() if c.priority == "batch")
    assert rules.max_wait_s < batch_s <= BATCH_PATIENCE * rules.max_wait_s + 10


def test_a_batch_makes_way_between_its_calls() -> None:
    """A long batch on engine 0; a caller of engine 1 waits for the calls under way, not for the batch."""
    scheduler = Scheduler(Rules(slots=1, max_wait_s=5.0, min_loaded_s=2.0))
    queues = [EngineQueue(EngineView(engine_id=name)) for name in "ab"]
    scheduler.queues = {queue.view.engine_id: queue for queue in queues}
    scheduler.announce(queues[0], 1000, 0.0)
    first = scheduler.claim(queues[0], "batch", 0.0)
    assert scheduler.step(0.0).load == [queues[0]]
    assert scheduler.loaded(queues[0], 1.0, load_s=1.0) == [first]
    caller = scheduler.claim(queues[1], "online", 2.0)
    step = scheduler.step(2.0)
    assert (step.drain, step.unload) == ([queues[0]], [])
    scheduler.claim(queues[0], "batch", 2.5)
    scheduler.release(first, 3.0)
    assert scheduler.step(3.0).unload == [queues[0]]
    scheduler.unloaded(queues[0])
    assert scheduler.step(3.5).load == [queues[1]]
    assert scheduler.loaded(queues[1], 4.5, load_s=1.0) == [caller]


def test_a_call_that_leaves_frees_its_place() -> None:
    scheduler = Scheduler(Rules(slots=1), queue_limit=1)
    queue = scheduler.queues["a"] = EngineQueue(EngineView(engine_id="a"))
    ticket = scheduler.claim(queue, "online", 0.0)
    with pytest.raises(QueueFull, match="1 calls wait"):
        scheduler.claim(queue, "online", 0.0)
    scheduler.withdraw(ticket)
    scheduler.withdraw(ticket)  # once is enough
    assert (scheduler.waiting, queue.view.online, queue.view.due_s) == (0, 0, math.inf)
    assert scheduler.step(0.0).load == [], "nobody wants it any more"
    scheduler.claim(queue, "online", 0.0)


def test_those_who_leave_take_no_memory_behind_one_who_stays() -> None:
    queue = EngineQueue(EngineView(engine_id="a"))
    queue.push(Ticket(queue, "online", 0.0, 0.0))
    for i in range(10_000):
        ticket = Ticket(queue, "online", 1.0 + i, 0.0)
        queue.push(ticket)
        queue.remove(ticket)
    assert (queue.view.online, queue.view.due_s) == (1, 0.0)
    assert len(queue._dues["online"]) < 50


def test_a_nearer_deadline_is_due_sooner_and_a_hopeless_one_is_no_reason_to_hurry() -> None:
    scheduler = Scheduler(Rules(slots=1, max_wait_s=60.0))
    queue = scheduler.queues["a"] = EngineQueue(EngineView(engine_id="a", load_s=5.0))
    scheduler.claim(queue, "online", 0.0)
    assert queue.view.due_s == 60.0
    scheduler.claim(queue, "online", 0.0, expires_s=4.0)
    assert queue.view.due_s == 60.0
    scheduler.claim(queue, "online", 0.0, expires_s=25.0)
    assert queue.view.due_s == 20.0


def test_a_failed_engine_is_refused_until_its_time_is_over() -> None:
    scheduler = Scheduler(Rules(slots=1))
    queue = scheduler.queues["a"] = EngineQueue(EngineView(engine_id="a"))
    ticket = scheduler.claim(queue, "online", 0.0)
    scheduler.step(0.0)
    assert scheduler.load_failed(queue, failure="no memory", retry_s=60.0) == [ticket]
    scheduler.unloaded(queue)
    with pytest.raises(Unavailable, match="no memory") as caught:
        scheduler.claim(queue, "online", 1.0)
    assert caught.value.retry_after_s == 59.0
    scheduler.claim(queue, "online", 61.0)
    assert scheduler.step(61.0).load == [queue]


def test_fewer_slots_than_before_let_engines_go() -> None:
    ready = [EngineView(engine_id=name, state="ready", holds=True, ready_s=i) for i, name in enumerate("abc")]
    assert choose(9.0, ready, Rules(slots=1)).evict == ("a", "b")
    assert choose(9.0, ready, Rules(slots=3)).evict == ()


def test_a_large_engine_takes_the_place_of_several_small_ones() -> None:
    small = [EngineView(engine_id=name, state="ready", holds=True, memory_gib=2.0) for name in "abc"]
    large = EngineView(engine_id="large", memory_gib=5.0, online=1, due_s=0.0)
    assert choose(1.0, [*small, large], Rules(memory_gib=7.0)).evict == ("a", "b")
    assert choose(1.0, [large], Rules(memory_gib=1.0)).engine_id == "large", "alone, it may always be tried"


def test_a_jump_of_the_clock_makes_everything_due_and_breaks_nothing() -> None:
    rows = [Call(0.1 * i, i % ENGINES, 0, 20) for i in range(20)]
    rows += [Call(1e6 + 0.1 * i, i % ENGINES, 0, 20) for i in range(20)]
    outcome = Watched(Scheduler(Rules(slots=1)), [Speeds(load_s=3.0, decode_tps=10.0)] * ENGINES).run(iter(rows))
    assert len(outcome.calls) == 40
