"""Time that tests own: sleeps and timeouts cost nothing, and a run that waits for what never comes fails at once."""

import asyncio
import gc
import selectors
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar
from unittest import mock

import pytest

T = TypeVar("T")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Where the loop would sleep, the clock jumps."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "every task waits, and nothing will ever wake one"
            self._clock.now += timeout
        return ready


def run_virtually(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main()`` with ``time.monotonic`` and the loop on one virtual clock that starts at 1000 s.

    Whatever the loop would only have logged (an exception that nobody retrieved, say) fails the test.
    """
    clock, complaints = Clock(), []
    with (
        mock.patch("time.monotonic", clock),
        asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_Selector(clock))) as runner,
    ):
        runner.get_loop().set_exception_handler(lambda _, context: complaints.append(context))
        result = runner.run(main())
        gc.collect()
    assert complaints == []
    return result


@pytest.fixture(scope="session")
def virtual() -> Iterator[Callable[[Callable[[], Coroutine[Any, Any, T]]], T]]:
    gc.collect()
    gc.freeze()  # each run collects its own garbage only
    yield run_virtually
    gc.unfreeze()
