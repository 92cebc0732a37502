"""vLLM's worker for CPUs, with one mistake of its mended. Imported by vLLM, in its process, by the name that
vllm_options.py gives it.

A prompt that does not fit into one step is read in several, and what is sampled after each but the last is thrown away.
vLLM (0.29) then turns the request's random numbers back by an offset, which torch's generators on CPUs do not have: the
engine died of any request with a seed and a temperature that came while it was busy. Here they begin anew instead, so
that a seed gives the same numbers however its prompt was cut.
"""

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):
    def init_device(self) -> None:
        super().init_device()  # type: ignore[no-untyped-call]
        runner = self.model_runner
        if isinstance(runner, CPUModelRunner):
            _mend(runner)


def _mend(runner: Any) -> None:
    keep_books = runner._bookkeeping_sync

    def keep_books_without_offsets(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        discarded = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        begun = {row: batch.generators.pop(row) for row in discarded if row in batch.generators}
        for generator in begun.values():
            generator.manual_seed(generator.initial_seed())
        try:
            return keep_books(*args, **kwargs)
        finally:
            batch.generators.update(begun)

    runner._bookkeeping_sync = keep_books_without_offsets
