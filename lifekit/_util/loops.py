"""What AnyIO has no word for: which loop runs here, its clock at hand, and a task of its own."""

from __future__ import annotations

import asyncio
import gc
import sys
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextvars import Context, ContextVar, copy_context
from typing import Any, NamedTuple, cast

import anyio


def running_loop() -> object | None:
    """Return what identifies the event loop that runs here, None in a thread that has none."""
    loop = asyncio._get_running_loop()
    trio = sys.modules.get("trio") if loop is None else None
    # In code between two steps of a loop that runs as a guest there is a token, and no task.
    if trio is not None and trio.lowlevel.in_trio_task():
        return trio.lowlevel.current_trio_token()  # type: ignore[no-any-return]
    return loop


def clock() -> Callable[[], float]:
    """Return the clock of the loop that runs here."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        return loop.time
    from trio import current_time

    return current_time


def call_soon() -> Callable[[Callable[[], object]], object]:
    """Return what has a function called in the loop that runs here, from anywhere."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        return loop.call_soon_threadsafe
    from trio.lowlevel import current_trio_token

    return current_trio_token().run_sync_soon


def contexts_of_tasks() -> Iterator[tuple[object, Context]]:
    """Yield the tasks of the loop that runs here, each with its context."""
    if asyncio._get_running_loop() is not None:
        for task in asyncio.all_tasks():  # of Python 3.11 a task does not tell its context
            yield from ((task, each) for each in gc.get_referents(task) if type(each) is Context)
        return
    from trio import lowlevel

    left = [lowlevel.current_root_task()]
    while left:
        if (each := left.pop()) is not None:
            yield each, each.context
            left += [child for nursery in each.child_nurseries for child in nursery.child_tasks]


class _Task(asyncio.Task[Any]):
    # AnyIO puts the canceller's repr into each cancellation, for which asyncio looks up its code lines:
    # half of what the cancellation costs.
    __slots__ = ()

    def __repr__(self) -> str:
        return f"<Task {self.get_name()!r}{' done' * self.done()}>"


def spawn(
    coroutine: Coroutine[Any, Any, None],
    name: str,
    never_ran: Callable[[], None] | None = None,
    context: Context | None = None,
) -> object:
    """Run *coroutine* in a task that no scope of the caller encloses; it must not raise.

    Keep what is returned for as long as the task lives: asyncio does not. Call *never_ran* if the
    task is cancelled before its first step, of which the coroutine itself is not told.
    """
    loop = asyncio._get_running_loop()
    if loop is not None:
        # Not by loop.create_task(): a task factory may run the first steps inside of this call, as
        # asyncio.eager_task_factory does, or fail.
        task = _Task(coroutine, loop=loop, name=name, context=context)
        if never_ran is not None:
            # What runs here swallows its cancellations, so that a cancelled task is one that never ran.
            task.add_done_callback(lambda task: never_ran() if task.cancelled() else None)
        return task
    from trio import lowlevel

    return lowlevel.spawn_system_task(
        lambda: coroutine, name=name, context=copy_context() if context is None else context
    )


def conceal(task: object) -> None:
    """Keep a task of asyncio's from being cancelled by whoever cancels `asyncio.all_tasks()`.

    Runners do that when they end. Who waits for the task must be among those, and stand it.
    """
    if isinstance(task, asyncio.Task):
        asyncio._unregister_task(task)  # pyright: ignore[reportUnknownArgumentType]


def reveal(task: object) -> None:
    """Undo `conceal`."""
    if isinstance(task, asyncio.Task):
        asyncio._register_task(task)  # pyright: ignore[reportUnknownArgumentType]


sheltered: ContextVar[bool] = ContextVar("lifekit.sheltered", default=False)
"""Whether this code closes something: then the tasks that it makes are concealed as well."""
_shelters: dict[asyncio.AbstractEventLoop, _Shelter] = {}


def _plain_task(loop: Any, coroutine: Any, **options: Any) -> object:
    task: object = asyncio.Task(coroutine, loop=loop, **options)
    return task


class _Shelter:
    # Many a closing makes tasks of its own: asyncpg's pool gathers those that close its connections.
    # All tasks but lifekit's own come from the loop's task factory.
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.users = 0
        self._loop, self._factory = loop, loop.get_task_factory()
        self._concealed: list[object] = []
        loop.set_task_factory(cast("Any", self))

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> object:
        factory: Any = self._factory or _plain_task
        task: object = factory(loop, coroutine, **options)
        if sheltered.get():
            conceal(task)
            self._concealed.append(task)
        return task

    def end(self) -> None:
        if self._loop.get_task_factory() is cast("Any", self):
            self._loop.set_task_factory(self._factory)
        for task in self._concealed:
            if not cast("Any", task).done():
                reveal(task)


def shelter() -> Callable[[], None]:
    """Conceal the tasks that are made where `sheltered` is set, until what is returned is called."""
    loop = asyncio._get_running_loop()
    if loop is None:
        return lambda: None
    if loop not in _shelters:
        _shelters[loop] = _Shelter(loop)
    _shelters[loop].users += 1

    def leave() -> None:
        found = _shelters[loop]
        found.users -= 1
        if not found.users:
            _shelters.pop(loop).end()

    return leave


def is_by_deadline(error: BaseException) -> bool:
    """Return whether a cancellation says that the time of a scope is up, as AnyIO's and trio's do."""
    return getattr(error, "source", "") == "deadline" or "deadline exceeded" in str(error)


def uncancel(task: object) -> None:
    """Take a cancellation back that a task of asyncio's has swallowed."""
    if isinstance(task, asyncio.Task):
        task.uncancel()


@types.coroutine
def each_step(
    coroutine: Coroutine[Any, Any, None], begins: Callable[[], None], ended: Callable[[], object]
) -> Generator[Any, Any, None]:
    """Run *coroutine*, and tell of its steps, during each of which nothing else can run."""
    step: Callable[[Any], Any] = coroutine.send
    given: Any = None
    while True:
        begins()
        try:
            awaited = step(given)
        except StopIteration:
            return
        except GeneratorExit as error:
            if isinstance(given, GeneratorExit):  # the loop was closed
                raise
            raise RuntimeError("GeneratorExit was raised by what is not being closed") from error
        finally:
            ended()
        try:
            step, given = coroutine.send, (yield awaited)
        except BaseException as error:
            step, given = coroutine.throw, error


async def sit_out(done: anyio.Event) -> BaseException | None:
    """Wait for *done* through every cancellation; return the one to deliver then, if any."""
    # A shield keeps AnyIO's scopes out, but not task.cancel(): hence the loop.
    interrupt: BaseException | None = None
    while not done.is_set():
        try:
            with anyio.CancelScope(shield=True):
                await done.wait()
        except (GeneratorExit, Exception):
            raise
        except BaseException as error:
            if interrupt is None or isinstance(interrupt, anyio.get_cancelled_exc_class()):
                interrupt = error
    return interrupt


class Outcome(NamedTuple):
    """How a coroutine ended, and what its caller must deliver afterwards."""

    error: BaseException | None
    in_time: bool
    interrupt: BaseException | None


class TimeLimit:
    """How long each of several things may take that are done one after the other."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.scope: anyio.CancelScope | None = None
        self._clock = clock()
        self.restart()

    def restart(self) -> None:
        """Note that the next one begins."""
        self.due: float = self._clock() + self.seconds
        if self.scope is not None:
            self.scope.deadline = self.due

    def watch(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        """Cancel *task* at its time."""
        self.alarm = loop.call_at(self.due, self._ring, loop, task)

    def _ring(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        if loop.time() < self.due:
            self.watch(loop, task)
        else:
            task.cancel()


async def undisturbed(coroutine: Coroutine[Any, Any, object], limit: TimeLimit) -> Outcome:
    """Run *coroutine* to its end through every cancellation of the caller, or cancel it at its time."""
    loop = asyncio._get_running_loop()
    if loop is None:
        error: BaseException | None = None
        with anyio.CancelScope(deadline=limit.due, shield=True) as limit.scope:
            try:
                await coroutine
            except BaseException as raised:
                if isinstance(raised, (anyio.get_cancelled_exc_class(), GeneratorExit)):
                    raise
                error = raised
        return Outcome(error, not limit.scope.cancelled_caught, None)
    task: asyncio.Task[object] = asyncio.Task(coroutine, loop=loop)
    limit.watch(loop, task)
    interrupt: BaseException | None = None
    kept = Kept(task)
    try:
        await kept
    except asyncio.CancelledError as raised:
        interrupt = raised if kept.asked else None
    except BaseException:
        if not task.done():  # else it is the task's own
            raise
    finally:
        limit.alarm.cancel()
    if task.cancelled():
        return Outcome(None, False, interrupt)
    return Outcome(task.exception(), True, interrupt)


class Kept:
    """A future of asyncio's that is not cancelled along with the task that waits for it.

    The task gets its cancellation when the future is done: it asks what it waits for, by the protocol
    that `asyncio.isfuture` goes by, to cancel itself, and hears that this can't be.
    """

    __slots__ = ("_asyncio_future_blocking", "_future", "asked")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self.asked: bool = False
        self._future = future
        self._asyncio_future_blocking = False

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the future's loop."""
        return self._future.get_loop()

    def add_done_callback(
        self, call: Callable[[Any], object], *, context: Context | None = None
    ) -> None:
        """Wake the task that waits."""
        self._future.add_done_callback(call, context=context)

    def cancel(self, msg: object = None) -> bool:
        """Refuse."""
        self.asked = True
        return False

    def __await__(self) -> Generator[Any, None, None]:
        if not self._future.done():
            self._asyncio_future_blocking = True
            yield self
