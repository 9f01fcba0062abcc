"""One application, its lifespan run as a server runs it, errors raised where it is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from contextvars import copy_context
from typing import Any

import anyio

from lifekit import events
from lifekit._core.block import Block, Sandboxing, sandboxing, workers_wanted
from lifekit._core.drivers import Isolation
from lifekit._core.errors import (
    LifekitError,
    SandboxError,
    ShutdownError,
    StartupError,
    WrongLoopError,
    summary,
    text_of,
)
from lifekit._core.lifespan import Lifespan
from lifekit._core.overrides import overrides, refuse_useless
from lifekit._core.stand_in import redact_error
from lifekit._util.asgi import ASGIApp, Scope
from lifekit._util.loops import running_loop, sit_out, spawn
from lifekit._util.redact import redact


def isolation() -> Isolation:
    """Return what undoes, in one lifespan, all that reaches PostgreSQL or Redis."""
    from lifekit._sandbox.postgres.sandbox import PostgresSandbox  # here, for other tests go without

    return PostgresSandbox()


@asynccontextmanager
async def running(
    app: ASGIApp, *, sandboxed: bool = False, workers: bool = True
) -> AsyncGenerator[Running]:
    """Run the application's lifespan around ``async with``, in a task of its own.

    It may be entered in one task and left in another, and shuts down whatever the body did. As with
    uvicorn, an application that raises before it asked for ``lifespan.startup`` has no lifespan, and is
    served as it is.

    Args:
        app: The ASGI application.
        sandboxed: Let lifekit's known values open sandboxed, for `Running.sandbox`.
        workers: Whether there are workers: sandboxed in blocks, and else all the while.

    Raises:
        BaseException: What the application itself raised: where it starts at the ``async with``, else
            at its end. Where the body failed as well, that error gets it as a note.
        StartupError: It said that it did not start, and raised nothing.
        ShutdownError: Likewise, that it did not stop cleanly.
    """
    served = Running(app)
    await served.start(sandboxed, workers=workers)
    try:
        yield served
    except BaseException as error:
        await served.stop(error)
        raise
    await served.stop(None)


class Running:
    """An application whose lifespan runs.

    Attributes: ``application``, as it was given; ``app``, the same with the state that its lifespan
    yielded, which serves requests; ``lifespans``, lifekit's.
    """

    def __init__(self, app: ASGIApp) -> None:
        if not callable(app):
            raise TypeError(f"an ASGI application is expected, not {app!r}")
        self.state: dict[str, Any] = {}
        self.unsupported: Exception | None = None
        self.application = app
        self._opened = Sandboxing(isolation)
        self._loop: object = None
        self._scope = anyio.CancelScope()
        self._stop = anyio.Event()
        self._answered = anyio.Event()  # it is up, or said that it failed, or ended
        self._ended = anyio.Event()
        self._asked = self._up = self._stopping = self._cancelled = False
        self._refusal: str | None = None
        self._error: BaseException | None = None
        self._task: Any = None

    async def app(
        self,
        scope: Scope,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        """Serve a request, with a state of its own, as servers do.

        Raises:
            WrongLoopError: It runs in another event loop.
            OverrideError: An override around this code came too late for this application.
        """
        if running_loop() is not self._loop:
            raise WrongLoopError(_ANOTHER_LOOP, resource="app", opened_at="another event loop")
        if overrides.get():
            for lifespan in self.lifespans:
                refuse_useless(lifespan)
        await self.application({**scope, "state": self.state.copy()}, receive, send)

    @property
    def lifespans(self) -> list[Lifespan]:
        """The lifespans that it runs: all of them if it opened sandboxed, else those in its state."""
        in_state = [each for each in self.state.values() if isinstance(each, Lifespan)]
        found = dict.fromkeys((*self._opened.lifespans, *in_state))
        return [each for each in found if each in each.registry.running.get(each.loop, ())]

    def sandbox(self, *, workers: bool = True) -> AbstractAsyncContextManager[Block]:
        """Undo, at the end of ``async with``, what was done inside to the values of its lifespans.

        Without *workers* none runs inside.

        Raises:
            SandboxError: It runs no lifespan of lifekit's.
        """
        blocks = [
            each.sandbox(workers=workers) for each in self.lifespans
        ]  # here, for they note their caller
        if not blocks:
            raise self._nothing_to_sandbox() from self.unsupported
        return blocks[0] if len(blocks) == 1 else _entered(blocks)

    async def start(self, sandboxed: bool, *, workers: bool = True) -> None:
        """Start it: see `running`."""
        self._loop = running_loop()
        context = copy_context()
        if sandboxed:
            context.run(sandboxing.set, self._opened)
        if not workers:
            context.run(workers_wanted.set, False)
        self._task = context.run(spawn, self._run(), "lifekit application", self._lost)
        try:
            await self._answered.wait()
            if not self._up:
                await self._ended.wait()
        except BaseException as interrupt:
            self._stop.set()
            if not self._up:
                self._cancel()
            await sit_out(self._ended)
            if self._error is not None:
                _note(interrupt, "start", self._error)
            raise
        if self._up:
            return
        if not self._asked and isinstance(self._error, Exception):
            self.unsupported = self._error
            events.logger.info(f"the application runs no lifespan: it raised {summary(self._error)}")
        elif self._error is not None:
            raise self._error
        elif self._refusal is not None:
            raise StartupError(f"the application did not start: {self._refusal}", [self._refused()])

    async def stop(self, error: BaseException | None) -> None:
        """Stop it, whatever comes meanwhile; *error* is what the body raised."""
        self._stop.set()
        interrupt = await sit_out(self._ended)
        failure = self._error if self._up else None
        if failure is None and self._up and self._refusal is not None:
            text = f"the application did not stop cleanly: {self._refusal}"
            failure = ShutdownError(text, [self._refused()])
        first = interrupt or error
        if failure is not None and not self._stopping:
            failure.add_note("lifekit: the application's lifespan ended with this while it was in use.")
        if failure is not None and first is not None:
            _note(first, "stop", failure)
        if interrupt is not None:
            raise interrupt
        if failure is not None and (error is None or not isinstance(failure, Exception)):
            raise failure

    def _refused(self) -> LifekitError:
        return LifekitError(self._refusal or "it gave no reason")

    def _nothing_to_sandbox(self) -> SandboxError:
        text = (
            "the application opened no lifespan of lifekit's while it started: there is nothing to "
            "sandbox. Let it use its registry: FastAPI(lifespan=registry.lifespan), or, in a lifespan "
            "of its own, `async with registry.lifespan() as state: yield state`. Or leave the sandbox "
            'out: client(app), or @pytest.mark.lifekit(isolation="none").'
        )
        if self.unsupported is not None:
            text += (
                f"\nIt has no lifespan at all: called for one, it raised {summary(self.unsupported)}"
            )
        return SandboxError(text)

    # -- the lifespan's own task ----------------------------------------------------------------

    async def _run(self) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
        }
        try:
            with self._scope:
                await self.application(scope, self._receive, self._send)
        except GeneratorExit:  # the loop was closed under it
            raise
        except anyio.get_cancelled_exc_class():
            if not self._cancelled:
                self._lost()
        except BaseException as error:
            self._error = redact_error(error)
        finally:
            self._end()

    def _lost(self) -> None:
        self._asked = True  # as far as anybody knows
        self._error = LifekitError("the task of the application's lifespan was cancelled")
        self._end()

    def _end(self) -> None:
        self._answered.set()
        self._ended.set()

    async def _receive(self) -> Scope:
        if not self._asked:
            self._asked = True
            return {"type": "lifespan.startup"}
        if self._refusal is None and not self._stopping:
            await self._stop.wait()
            self._stopping = True
            return {"type": "lifespan.shutdown"}
        # A server has no more to say. Who asks in an endless loop is ended, as by the server's end.
        self._cancel()
        await anyio.sleep_forever()
        raise AssertionError

    async def _send(self, message: Scope) -> None:
        kind = message["type"]
        if kind == "lifespan.startup.complete":
            self._up = True
        elif kind in ("lifespan.startup.failed", "lifespan.shutdown.failed"):
            self._refusal = redact(message.get("message") or "")
        self._answered.set()

    def _cancel(self) -> None:
        self._cancelled = True
        # Once, as asyncio's own tools do: an AnyIO scope would cancel the cleaning up over and over.
        if isinstance(self._task, asyncio.Task):
            self._task.cancel()  # pyright: ignore[reportUnknownMemberType]
        else:
            self._scope.cancel()


def lifespan_of(served: Running) -> Lifespan:
    """Return the lifespan of lifekit's that an application opened first.

    Raises:
        LifekitError: It opened none.
    """
    found = served.lifespans
    if not found:
        raise LifekitError(
            "the application opened no lifespan of lifekit's while it started: "
            "FastAPI(lifespan=registry.lifespan) makes it do so"
        ) from served.unsupported
    return found[0]


@asynccontextmanager
async def _entered(blocks: list[Block]) -> AsyncGenerator[Block]:
    async with AsyncExitStack() as stack:
        for block in blocks:
            await stack.enter_async_context(block)
        yield blocks[-1]


def _note(error: BaseException, what: str, failure: BaseException) -> None:
    error.add_note(
        f"lifekit: and the application did not {what} cleanly: {summary(failure)}\n{text_of(failure)}"
    )


_ANOTHER_LOOP = (
    "this application was started in another event loop than the one that sends it a request, and its "
    "connections belong to that. Let the test and its fixtures run in one loop: with pytest-asyncio, "
    "give them the same loop_scope."
)
