"""A coroutine of asyncio's that is never cut in its midst, and that costs no task."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

from lifekit._backend import Kept

T = TypeVar("T")


class Uncut(Generic[T]):
    """A coroutine that has begun, and that whoever awaits this carries on to its end.

    A cancellation of the awaiting task arrives when the coroutine is done. So the coroutine itself must
    not wait by scopes or timeouts that work by cancelling their task.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        """Make the first step at once, up to where the coroutine waits for something."""
        self._coroutine = coroutine
        self._error: BaseException | None = None
        self._step()

    def _step(self) -> None:
        self._waits_for: Any = None
        self._done = True
        try:
            self._waits_for = self._coroutine.send(None)
        except StopIteration as stop:
            self._result: T = stop.value
        except BaseException as error:
            self._error = error
        else:
            self._done = False
            if self._waits_for is not None:  # as a task does which is given a future
                self._waits_for._asyncio_future_blocking = False

    def __await__(self) -> Generator[Any, None, T]:
        cancelled: asyncio.CancelledError | None = None
        while not self._done:
            kept = Kept(self._waits_for) if self._waits_for is not None else None
            try:
                if kept is None:
                    yield
                else:
                    yield from kept.__await__()
            except asyncio.CancelledError as error:
                if kept is None or kept.asked:
                    cancelled = error
            except Exception:
                pass  # what it waits for has failed, as the coroutine will find
            self._step()
        failure, self._error = self._error, None
        if cancelled is not None:
            raise cancelled
        if failure is not None:
            raise failure
        return self._result
