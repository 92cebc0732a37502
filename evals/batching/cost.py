"""What the scheduler itself costs: a decision, a million calls, memory."""

import time
import tracemalloc
from dataclasses import dataclass

from evals.batching.settings import SMALL, Online
from evals.batching.simulation import Simulation
from orchestrator.scheduler import EngineQueue, Scheduler
from orchestrator.swaps import EngineView, Rules, choose


@dataclass(frozen=True, slots=True, kw_only=True)
class Million:
    """Seconds of CPU, for the arrivals, the engines and the scheduler together."""

    calls: int
    cpu_s: float
    virtual_s: float
    loads: int


def decision_us(*, engines: int, waiting: int, slots: int) -> tuple[float, float]:
    """Least and median microseconds of a decision, with as many calls waiting as said."""
    scheduler = _crowd(engines=engines, waiting=waiting, slots=slots)
    views = [queue.view for queue in scheduler.queues.values()]
    took = []
    for i in range(2000):
        started = time.perf_counter()
        choose(1.0 + i * 1e-3, views, scheduler.rules)
        took.append(time.perf_counter() - started)
    took.sort()
    return took[0] * 1e6, took[len(took) // 2] * 1e6


def bytes_a_call(*, engines: int, waiting: int) -> float:
    tracemalloc.start()
    try:
        crowd = _crowd(engines=engines, waiting=waiting, slots=4)
        size, _ = tracemalloc.get_traced_memory()
        return size / crowd.waiting
    finally:
        tracemalloc.stop()


def million(calls: int, *, engines: int = 64, slots: int = 4) -> Million:
    """Nothing is kept of a call that has ended."""
    setting = Online(engines=engines, slots=slots, max_wait_s=600.0)
    scheduler = Scheduler(Rules(slots=slots, max_wait_s=setting.max_wait_s))
    simulation = Simulation(scheduler, [SMALL] * engines, keep=False)
    started = time.process_time()
    rate = 20.0
    outcome = simulation.run(setting.calls(rate, calls / rate, seed=0))
    return Million(calls=calls, cpu_s=time.process_time() - started, virtual_s=outcome.end_s, loads=outcome.loads)


def _crowd(*, engines: int, waiting: int, slots: int) -> Scheduler:
    """All slots taken by engines with calls under way, ``waiting`` calls for the others, none of them due."""
    scheduler = Scheduler(Rules(slots=slots, max_wait_s=600.0))
    for i in range(engines):
        queue = EngineQueue(EngineView(engine_id=f"{i}", load_s=5.0, run_s=3.0))
        scheduler.queues[queue.view.engine_id] = queue
    queues = list(scheduler.queues.values())
    for queue in queues[:slots]:
        scheduler.take_up(queue)
        scheduler.loaded(queue, 0.0, load_s=5.0)
        scheduler.claim(queue, "online", 0.0)
    for i in range(waiting):
        scheduler.claim(queues[slots + i % (engines - slots)], "online", 0.5 + i * 1e-6)
    return scheduler
