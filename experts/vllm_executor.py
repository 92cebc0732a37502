"""vLLM's executors, told how to end. Imported by vLLM, in its process, by the name that vllm_options.py gives it.

When the service is killed it cannot tell them itself, and their gigabytes would stay; so they watch it.
"""

import multiprocessing
import multiprocessing.util
import os
import threading

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class OneProcess(UniProcExecutor):
    """The model runs in the scheduler's process."""

    def _init_executor(self) -> None:
        _end_with_parent()
        super()._init_executor()

    def shutdown(self) -> None:
        super().shutdown()
        # After multiprocessing has cleaned up, and instead of the seconds that Python takes to dismantle torch.
        multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=-100)


class WorkerProcess(MultiprocExecutor):
    """The model runs in a process below the scheduler's, which ends with that one."""

    def _init_executor(self) -> None:
        _end_with_parent()
        super()._init_executor()


def _end_with_parent() -> None:
    threading.Thread(target=_follow, name="end-with-parent", daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
