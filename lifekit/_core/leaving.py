"""How a running lifespan is made to end: the server is told, or the body is cancelled."""

from __future__ import annotations

import asyncio
import inspect
import opcode
import sys
from types import FrameType
from typing import Any
from weakref import ref

from lifekit import events

from .signals import is_served, stop_server


class Ending:
    """The end of one lifespan, which may be asked for before its body begins."""

    def __init__(self, name: str) -> None:
        """*name* is the registry's."""
        self._name = name
        self._is_served = self._ends_body = False
        self._body: Body | None = None

    def found(self, entering: FrameType | None) -> None:
        """Note who runs the lifespan that begins in *entering*."""
        self._is_served = is_served(entering)

    def begin(self, entering: FrameType | None) -> None:
        """Note that its body begins."""
        self._body = body(entering)
        if self._ends_body:
            self._end_body(self._body)

    def ask(self) -> None:
        """Ask for the end; where nobody can be asked say so."""
        if self._is_served:
            if not stop_server():
                self._goes_on()
            return
        self._ends_body = True
        if self._body is not None:
            self._end_body(self._body)

    async def leave(self, error: BaseException | None) -> BaseException | None:
        """Return what the body ended with, without the cancellation that was asked for here."""
        return error if self._body is None else await self._body.leave(error)

    def _end_body(self, body: Body) -> None:
        if not body.cancel():
            self._goes_on()

    def _goes_on(self) -> None:
        events.logger.error(
            f"{self._name} can't be ended from here, and goes on, unready, until it is left: it was "
            "entered in a test's fixture, under a server that lifekit can't tell, or in a task that "
            "does something else now. Enter it by `async with` in the task that is to end, or let that "
            "wait for lifespan.stopping.wait() and leave it."
        )


class Body:
    """The code inside one ``async with``; as such one that can't be cancelled."""

    def cancel(self) -> bool:
        """Cancel it, or return False."""
        return False

    async def leave(self, error: BaseException | None) -> BaseException | None:
        """Return what it ended with, without the cancellation that was asked for here."""
        return error


def body(entering: FrameType | None) -> Body:
    """Return the body that *entering*, which awaits the entering of a lifespan, goes on with."""
    frame, nests = entering, True
    while frame is not None and (_is_generator(frame) or _name_of(frame) == "contextlib"):
        if _name_of(frame) != "contextlib":
            if frame.f_back is None or _name_of(frame.f_back) != "contextlib":
                return Body()  # a fixture: whoever drives it does something else in the meantime
            nests &= _is_async_with(frame)
        elif frame.f_code.co_name != "__aenter__":  # an exit stack, which may outlive its place
            nests = False
        frame = frame.f_back
    if frame is None or _name_of(frame).partition(".")[0] in _LOOPS or not _awaits(frame):
        return Body()
    if asyncio._get_running_loop() is not None:
        return _OfAsyncio()
    return _OfTrio() if nests and _is_async_with(frame) else Body()


_LOOPS = {"anyio", "asyncio", "trio"}
_AWAITS = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE
_GET_AWAITABLE = opcode.opmap["GET_AWAITABLE"]


def _name_of(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name


def _is_generator(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR)


def _awaits(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & _AWAITS)


def _is_async_with(frame: FrameType) -> bool:
    """Return whether what *frame* awaits is an ``async with`` being entered."""
    # Its argument says so, from Python 3.11 on: 1 is __aenter__, 2 is __aexit__, 0 any other await.
    code, at = frame.f_code.co_code, frame.f_lasti
    while at >= 0 and code[at] != _GET_AWAITABLE:
        at -= 2
    return at >= 0 and code[at + 1] == 1


class _OfAsyncio(Body):
    # By task.cancel(), as asyncio's own task groups do it: a scope could not be left in another task.
    def __init__(self) -> None:
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        self._task = ref(task)
        self._before = task.cancelling()
        self._asked = False

    def cancel(self) -> bool:
        task = self._task()
        self._asked = self._asked or (task is not None and task.cancel())  # False where that is over
        return self._asked

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
    # By a scope, which has to be left in the order of scopes: that is sure of `async with` alone.
    def __init__(self) -> None:
        trio: Any = sys.modules["trio"]
        self._current = trio.lowlevel.current_task
        self._task, self._scope = self._current(), trio.CancelScope()
        self._scope.__enter__()

    def cancel(self) -> bool:
        self._scope.cancel()
        return True

    async def leave(self, error: BaseException | None) -> BaseException | None:
        if self._current() is not self._task:
            return error
        try:
            caught = self._scope.__exit__(type(error), error, None)
        except BaseException as rest:  # a group, without what was cancelled
            return rest
        return None if caught else error
