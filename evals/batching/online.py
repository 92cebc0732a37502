"""Traffic over more engines than slots: the scheduler against first come first served, on the same arrivals."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evals.batching.baselines import FirstCome
from evals.batching.settings import Online
from evals.batching.simulation import Outcome, Simulation
from orchestrator.scheduler import Scheduler
from orchestrator.swaps import Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineResult:
    """Of what ended within the time; of those still under way or waiting, ``left`` tells how many."""

    outcome: Outcome
    until_s: float
    left: int

    @property
    def throughput(self) -> float:
        return len(self.outcome.calls) / self.until_s

    def latency_s(self, percent: float) -> float:
        return float(np.percentile(self.outcome.latency_s, percent))

    @property
    def worst_wait_s(self) -> float:
        return max(self.outcome.wait_s)


def measure(setting: Online, *, rate: float, until_s: float, seed: int) -> Mapping[str, OnlineResult]:
    rules = Rules(slots=setting.slots, max_wait_s=setting.max_wait_s, min_loaded_s=setting.min_loaded_s)
    at_once = Rules(slots=setting.slots, max_wait_s=0.0, min_loaded_s=0.0)
    schedulers = {
        "first come, first served": FirstCome(rules),
        "swap at once": Scheduler(at_once),
        "collegium": Scheduler(rules),
    }
    results = {}
    for name, scheduler in schedulers.items():
        simulation = Simulation(scheduler, [setting.speeds] * setting.engines)
        outcome = simulation.run(setting.calls(rate, until_s, seed), until_s=until_s)
        begun = sum(e.queue.view.running_online for e in simulation.engines)
        results[name] = OnlineResult(outcome=outcome, until_s=until_s, left=scheduler.waiting + begun)
    return results
