"""How a running lifespan is made to end: the body of its ``async with`` is cancelled."""

from __future__ import annotations

import asyncio
import inspect
import sys
from types import FrameType
from typing import Any
from weakref import ref


def body(entering: FrameType | None) -> Body | None:
    """Return the body of an ``async with`` that begins in this task, None where there is none.

    *entering* is what awaits the entering. Where that is a task of its own, there is nothing to cancel.
    """
    package = entering.f_globals.get("__name__", "").partition(".")[0] if entering is not None else ""
    if entering is None or package in _LOOPS or not entering.f_code.co_flags & _AWAITS:
        return None
    return _OfAsyncio() if asyncio._get_running_loop() is not None else _OfTrio()


_LOOPS = {"anyio", "asyncio", "trio"}
_AWAITS = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE


class Body:
    """The code inside one ``async with``, which can be cancelled from elsewhere."""

    def cancel(self) -> None:
        """Cancel it."""
        raise NotImplementedError

    async def leave(self, error: BaseException | None) -> BaseException | None:
        """Return what it ended with, without the cancellation that was asked for here."""
        raise NotImplementedError


class _OfAsyncio(Body):
    # By task.cancel(), as asyncio's own task groups do it: a scope could not be left in another task.
    def __init__(self) -> None:
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        self._task = ref(task)
        self._before = task.cancelling()
        self._asked = False

    def cancel(self) -> None:
        if (task := self._task()) is not None and not self._asked:
            self._asked = task.cancel()  # False where that task is over

    async def leave(self, error: BaseException | None) -> BaseException | None:
        task = self._task()
        if not self._asked or task is None or asyncio.current_task() is not task:
            return error
        task.uncancel()
        if isinstance(error, asyncio.CancelledError):
            return error if task.cancelling() > self._before else None
        try:
            await asyncio.sleep(0)  # where it was not delivered yet, it is here
        except asyncio.CancelledError as late:
            if task.cancelling() > self._before:
                return error if error is not None and not isinstance(error, Exception) else late
        return error


class _OfTrio(Body):
    def __init__(self) -> None:
        trio: Any = sys.modules["trio"]
        self._current = trio.lowlevel.current_task
        self._task, self._scope = self._current(), trio.CancelScope()
        self._scope.__enter__()

    def cancel(self) -> None:
        self._scope.cancel()

    async def leave(self, error: BaseException | None) -> BaseException | None:
        if self._current() is not self._task:
            return error
        try:
            caught = self._scope.__exit__(type(error), error, None)
        except BaseException as rest:  # a group, without what was cancelled
            return rest
        return None if caught else error
