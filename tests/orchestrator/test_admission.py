import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from experts.errors import QueueFull
from orchestrator.admission import Admission


class Places(RuleBasedStateMachine):
    """Callers come, are cancelled and leave in any order, several of them between two turns of the loop; a list of who
    should run and who should wait, in order, is kept beside."""

    LIMIT, QUEUE = 2, 3

    @initialize()
    def open(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.admission = Admission(max_concurrency=self.LIMIT, queue=self.QUEUE)
        self.inside: list[int] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.doors: dict[int, asyncio.Event] = {}
        self.runs: list[int] = []
        self.waits: list[int] = []

    async def _visit(self, number: int, door: asyncio.Event) -> None:
        async with self.admission.place():
            self.inside.append(number)
            try:
                await door.wait()
            finally:
                self.inside.remove(number)

    def _turn(self) -> None:
        """Until everyone is where he stays."""
        for _ in range(4):
            self.loop.run_until_complete(asyncio.sleep(0))

    @rule()
    def come(self) -> None:
        number, door = len(self.tasks), asyncio.Event()
        self.doors[number] = door
        self.tasks[number] = self.loop.create_task(self._visit(number, door))
        self._turn()
        if len(self.runs) < self.LIMIT:
            self.runs.append(number)
        elif len(self.waits) < self.QUEUE:
            self.waits.append(number)
        else:
            assert isinstance(self.tasks[number].exception(), QueueFull)

    @precondition(lambda self: self.runs or self.waits)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        """Some leave by the door, some are cancelled, all in one turn of the loop."""
        present = [*self.runs, *self.waits]
        for number in data.draw(st.lists(st.sampled_from(present), unique=True, min_size=1)):
            if number in self.runs and data.draw(st.booleans()):
                self.doors[number].set()
            else:
                self.tasks[number].cancel()
            (self.runs if number in self.runs else self.waits).remove(number)
        self._turn()
        while self.waits and len(self.runs) < self.LIMIT:
            self.runs.append(self.waits.pop(0))

    @precondition(lambda self: self.runs and self.waits)
    @rule()
    def hand_over_to_one_who_leaves(self) -> None:
        """The place is given to the first in the queue, who is cancelled before he can take it."""
        first, heir = self.tasks[self.runs.pop(0)], self.tasks[self.waits.pop(0)]

        async def cancel_in_between() -> None:
            first.cancel()
            await asyncio.sleep(0)
            assert first.done()
            assert not heir.done()
            heir.cancel()

        self.loop.run_until_complete(cancel_in_between())
        self._turn()
        if self.waits:
            self.runs.append(self.waits.pop(0))

    @invariant()
    def exactly_those_run_who_should(self) -> None:
        assert sorted(self.inside) == sorted(self.runs)
        assert self.admission.queued == len(self.waits)

    def teardown(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        self._turn()
        assert all(task.done() for task in self.tasks.values())
        assert not self.inside
        assert self.admission.queued == 0
        assert self.admission._free == self.LIMIT
        self.loop.close()


TestPlaces = Places.TestCase
TestPlaces.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


async def test_past_the_queue_callers_are_told_to_come_back() -> None:
    admission = Admission(max_concurrency=1, queue=0)
    async with admission.place():
        with pytest.raises(QueueFull, match="0 requests wait") as caught:
            async with admission.place():
                pass
    assert caught.value.retry_after_s == 1.0
    async with admission.place():
        pass


async def test_first_come_first_served() -> None:
    admission, order = Admission(max_concurrency=1, queue=9), []

    async def visit(number: int) -> None:
        async with admission.place():
            order.append(number)

    async with admission.place():
        tasks = [asyncio.create_task(visit(i)) for i in range(5)]
        await asyncio.sleep(0)
        assert admission.queued == 5
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]


async def test_a_place_is_given_back_when_its_block_fails() -> None:
    admission = Admission(max_concurrency=1, queue=0)
    with pytest.raises(KeyError):
        async with admission.place():
            raise KeyError
    async with admission.place():
        pass


async def test_a_waiter_who_is_cancelled_as_a_place_frees_up_lets_the_next_in() -> None:
    admission = Admission(max_concurrency=1, queue=9)
    entered = []

    async def visit(name: str) -> None:
        async with admission.place():
            entered.append(name)

    async with admission.place():
        gone, next_one = asyncio.create_task(visit("gone")), asyncio.create_task(visit("next"))
        await asyncio.sleep(0)
        gone.cancel()
    await asyncio.gather(gone, next_one, return_exceptions=True)
    assert gone.cancelled()
    assert entered == ["next"]
