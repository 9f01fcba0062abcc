"""A lifespan for code that has no event loop: it runs in a thread of its own."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from math import inf
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import anyio
from anyio import CancelScope, get_cancelled_exc_class
from anyio.abc import TaskGroup
from anyio.from_thread import BlockingPortal, start_blocking_portal

from lifekit._util.loops import running_loop

from .errors import LifekitError
from .lifespan import Lifespan

T = TypeVar("T")


class BlockingLifespan(Lifespan):
    """A lifespan that is entered by ``with``, and runs in a thread of its own."""

    _portal: BlockingPortal
    _over: Future[None]  # when all is closed
    _calls: TaskGroup
    _takes_calls = False
    _left_body: anyio.Event

    def __enter__(self) -> Self:
        """Open everything.

        Raises:
            StartupError: Something failed to open; what had opened is closed again.
            LifekitError: It has run before, or runs.
        """
        self.refuse_again()
        with ExitStack() as stack:
            self._portal = stack.enter_context(
                start_blocking_portal(name=f"lifekit {self.registry.name}")
            )
            opened: Future[None] = Future()
            self._over = self._portal.start_task_soon(self._run, opened)
            self._over.add_done_callback(lambda _: opened.done() or opened.cancel())
            try:
                opened.result()
            except CancelledError:
                self._over.result()  # which says why it did not open
                raise
            except BaseException:
                self._over.cancel()
                _wait_for(self._over)
                raise
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close everything; Ctrl-C waits until that is done.

        Raises:
            ShutdownError: Some closings failed; everything else was closed all the same.
            CrashError: A worker or a resource crashed.
        """
        with self._stack:
            if not self._over.done():
                self._portal.start_task_soon(self._left_body.set)
            interrupt = _wait_for(self._over)
        if interrupt is not None:
            raise interrupt
        failure = self._over.exception()
        if failure is not None and failure is not error:  # else a call has raised it
            raise failure

    async def _run(self, opened: Future[None]) -> None:
        self._left_body = anyio.Event()
        async with self, anyio.create_task_group() as self._calls:
            self._takes_calls = True
            opened.set_result(None)
            try:
                await self._left_body.wait()
            finally:
                self._takes_calls = False
                self._calls.cancel_scope.cancel()

    @overload
    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T: ...
    @overload
    def call(self, function: Callable[..., T], *args: Any) -> T: ...
    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function, sync or async, in the lifespan's event loop; wait, and return what it does.

        Ctrl-C meanwhile cancels it, and is raised when it has ended.

        Args:
            function: Called with *args*, in the context of this code.

        Raises:
            LifekitError: The lifespan does not run, or was stopped meanwhile; or this code runs in its
                event loop.
            CrashError: A worker or a resource crashed meanwhile.
            BaseException: What the function raised.
        """
        if running_loop() is not None and running_loop() is self.loop:
            raise LifekitError(
                "call() waits for the event loop that this code runs in, and would wait forever. Await "
                "the function itself."
            )
        call = _Call(function, args)
        try:
            done = self._portal.start_task_soon(self._begin, call)
        except (AttributeError, RuntimeError):
            raise LifekitError(
                f"the lifespan made at {self.location} does not run. Call inside of `with "
                "registry.blocking() as lifespan:`."
            ) from None
        try:
            done.result()
            return call.result.result()
        except CancelledError:
            _wait_for(self._over)
            self._over.result()
            raise LifekitError(f"{self.registry.name} was stopped while a call ran") from None
        except BaseException:
            if not call.result.done():  # this thread was interrupted, not the call
                self._portal.start_task_soon(call.cancel)
                _wait_for(call.result)
            raise

    def _begin(self, call: _Call) -> None:
        if self._takes_calls:
            self._calls.start_soon(call.run)
        else:
            call.result.cancel()


class _Call:
    """One function that is to run in another thread's loop, and what came of it."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function, self._args = function, args
        self._scope: CancelScope | None = None
        self.result: Future[Any] = Future()

    def cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    async def run(self) -> None:
        try:
            with CancelScope() as self._scope:
                value = self._function(*self._args)
                if inspect.isawaitable(value):
                    value = await value
                self.result.set_result(value)
        except get_cancelled_exc_class() as error:
            if anyio.current_effective_deadline() == -inf:  # all calls are to end
                raise
            self.result.set_exception(error)  # of what it awaited
        except BaseException as error:
            self.result.set_exception(error)
        finally:
            if not self.result.done():
                self.result.cancel()


def _wait_for(future: Future[Any]) -> KeyboardInterrupt | None:
    """Wait for the end through every Ctrl-C, and return the first."""
    interrupt: KeyboardInterrupt | None = None
    while not future.done():
        try:
            future.exception()
        except KeyboardInterrupt as error:
            interrupt = interrupt or error
        except CancelledError:
            break
    return interrupt
