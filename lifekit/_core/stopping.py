"""The notice that a lifespan is about to end: what code that never ends by itself waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Coroutine
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import anyio
from anyio.lowlevel import checkpoint

from lifekit._util.loops import running_loop

from .errors import NotOpenError
from .resource import RequestSignature, is_async
from .running import current, everywhere

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from .lifespan import Lifespan  # which sets it

T = TypeVar("T")


class Stopping:
    """Whether a lifespan is about to end. It is set once, and stays set."""

    __slots__ = ("_event", "_is_set", "_parts", "_waiting", "_whole")

    def __init__(self, whole: Stopping | None = None) -> None:
        """Called by lifespans; one with a *whole* is set with that at the latest."""
        self._is_set = whole is not None and whole.is_set()
        self._event: anyio.Event | None = None
        self._waiting: set[_OnAsyncio | _OnTrio] = set()
        self._parts: set[Stopping] = set()
        self._whole = whole
        if whole is not None:
            whole._parts.add(self)

    def is_set(self) -> bool:
        """Return whether the lifespan is about to end."""
        return self._is_set

    async def wait(self) -> None:
        """Wait until it is."""
        if self._is_set:
            await checkpoint()
            return
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()

    async def until(self, items: AsyncIterable[T]) -> AsyncIterator[T]:
        """Iterate over *items* until it is set, or they end.

        Where it waits for the next one then, that waiting is cancelled; one that has come is given.
        """
        iterator = aiter(items)
        waiting = _OnTrio() if asyncio._get_running_loop() is None else _OnAsyncio()
        self._waiting.add(waiting)
        try:
            while not self._is_set:
                with waiting:
                    item = await anext(iterator)
                if waiting.was_cancelled:
                    break
                yield item  # pyright: ignore[reportPossiblyUnbound]
        except StopAsyncIteration:
            return
        finally:
            self._waiting.discard(waiting)
        if (close := getattr(iterator, "aclose", None)) is not None:
            await close()

    def forget(self) -> None:
        """Be no part of the whole any more."""
        if self._whole is not None:
            self._whole._parts.discard(self)

    def mark(self) -> None:
        """Set it, and wake nobody yet: all that a signal handler may do."""
        self._is_set = True
        for part in [*self._parts]:
            part.mark()

    def set(self) -> None:
        """Set it, for lifespans; to end one yourself call ``lifespan.stop()``."""
        self._is_set = True
        if self._event is not None:
            self._event.set()
        for waiting in [*self._waiting]:
            waiting.cancel()
        for part in [*self._parts]:
            part.set()

    def __repr__(self) -> str:
        return f"<Stopping, {'set' if self._is_set else 'not set'}>"


_STEADY, _LOOKS = 3, 50
"""A task is cancelled that has waited for one thing for so many rounds of the loop; looks at most."""
_AGAIN = 1.0
"""Seconds after which it is cancelled again."""


class _OnAsyncio:
    """What may be cancelled by the notice, over and over: by the task, for a scope costs far more."""

    def __init__(self) -> None:
        self.was_cancelled = False
        self._task: asyncio.Task[Any] | None = None
        self._before = self._asked = self._looks = self._rounds = 0
        self._seen: object = None
        self._next: asyncio.Handle | None = None

    def __enter__(self) -> None:
        self._task = task = asyncio.current_task()
        self._before = task.cancelling() if task is not None else 0

    def cancel(self) -> None:
        if self._next is None:
            self._look()

    def _look(self) -> None:
        # What has come would be lost by cancelling a task that waits no more. And before Python 3.12,
        # asyncio.wait_for loses a cancellation that comes when what it waits for has just come.
        if (task := self._task) is None:
            return
        waits_for = getattr(task, "_fut_waiter", None)
        waits = waits_for is not None and not waits_for.done()
        self._rounds = self._rounds + 1 if waits and waits_for is self._seen else 0
        self._seen, self._looks = waits_for, self._looks + 1
        if self._rounds < _STEADY and self._looks < _LOOKS:
            self._next = task.get_loop().call_soon(self._look)
        else:
            self._asked += task.cancel()
            self._next = task.get_loop().call_later(_AGAIN, self._look)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        task, self._task = self._task, None
        if self._next is None or task is None:
            return False
        self._next.cancel()
        left = [task.uncancel() for _ in range(self._asked)]
        ours = bool(left) and left[-1] <= self._before
        self.was_cancelled = ours and isinstance(error, asyncio.CancelledError)
        return self.was_cancelled


class _OnTrio:
    """The same by a scope, of which each waiting has one of its own."""

    def __init__(self) -> None:
        self.was_cancelled = False
        self._scope: anyio.CancelScope | None = None

    def __enter__(self) -> None:
        self._scope = anyio.CancelScope()
        self._scope.__enter__()

    def cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        scope, self._scope = self._scope, None
        assert scope is not None
        scope.__exit__(kind, error, traceback)
        self.was_cancelled = scope.cancelled_caught
        return self.was_cancelled


of_worker: ContextVar[tuple[Lifespan, Stopping] | None] = ContextVar("lifekit.stopping", default=None)
"""In a worker: its lifespan, and what tells it alone."""


class StoppingOf:
    """What `lifekit.stopping` is: a function, and a dependency that costs no thread."""

    __name__: ClassVar[str] = "stopping"
    __signature__: ClassVar[RequestSignature] = RequestSignature()
    __wrapped__: ClassVar[Any] = staticmethod(is_async)

    @overload
    def __call__(self) -> Stopping: ...
    @overload
    def __call__(self, connection: HTTPConnection) -> Coroutine[Any, Any, Stopping]: ...
    def __call__(self, connection: Any = None) -> Any:
        """Return the `Stopping` of the lifespan that this code runs in: of a request its own.

        In a worker it is the worker's, which is set when the worker is to end. As a dependency it is
        ``Depends(lifekit.stopping)``.

        Raises:
            NotOpenError: No lifespan runs here.
        """
        return _find() if connection is None else _of_request(connection)


stopping: StoppingOf = StoppingOf()
"""``lifekit.stopping()`` is the `Stopping` of the lifespan that this code runs in.

In a request it is that of the lifespan which serves it. In a worker it is the worker's, which is set
when that is to end. ``Depends(lifekit.stopping)`` is the same for a route.

Raises:
    NotOpenError: No lifespan runs.
"""


async def _of_request(connection: HTTPConnection) -> Stopping:
    from .lifespan import Lifespan  # which imports this module

    state: dict[str, object] = connection.scope.get("state") or {}
    for value in state.values():
        if isinstance(value, Lifespan):
            return value.stopping
    return _find()


def _find() -> Stopping:
    here = current.get() or everywhere.get(running_loop(), ())[::-1]
    if not here:
        raise NotOpenError(
            "stopping() is asked for, and no lifespan runs here. Ask inside `async with "
            "registry.lifespan()`, in a worker, or in a request of an application that has one: "
            "FastAPI(lifespan=registry.lifespan).",
            resource="stopping",
        )
    worker = of_worker.get()
    return worker[1] if worker is not None and worker[0] is here[0] else here[0].stopping
