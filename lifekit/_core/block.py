"""Test mode's side of a lifespan: who opens sandboxed, and blocks in which everything is undone.

Blocks of one lifespan nest. The context tells which ones do: code that was started inside of a block
may begin another one there; other code would be a second test at the same time, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

import anyio

from lifekit._util.call_sites import Site
from lifekit._util.loops import TimeLimit, sit_out, undisturbed

from .errors import (
    CrashError,
    SandboxBusyError,
    SandboxError,
    SandboxEscapedError,
    SandboxUnsupportedError,
    summary,
    text_of,
)

if TYPE_CHECKING:
    from .drivers import Isolation, Sandbox  # whose sandboxes a block begins and ends
    from .lifespan import Lifespan  # whose block it is


class Sandboxing:
    """Lifespans that are opened in its context open sandboxed, and are noted here."""

    def __init__(self, isolation: Callable[[], Isolation]) -> None:
        self.isolation = isolation
        self.lifespans: list[Lifespan] = []


sandboxing: ContextVar[Sandboxing | None] = ContextVar("lifekit.sandboxing", default=None)
workers_wanted: ContextVar[bool] = ContextVar("lifekit.workers_wanted", default=True)
"""Whether lifespans that are opened in this context have workers."""
current_block: ContextVar[Block | None] = ContextVar("lifekit.block", default=None)
"""The block in which this code was started."""


def refuse_stragglers(what: str) -> None:
    """Raise `SandboxEscapedError` in code that was started in a block which has ended since."""
    block = current_block.get()
    if block is not None and block.over:
        raise SandboxEscapedError(
            f"{what} is used by code that was started inside the sandbox at {block.location}, which "
            "has ended. It outlived its test, and what it does now would last. Let the test wait for "
            "it, or let the application wait where it starts it."
        )


class Block:
    """One ``async with lifespan.sandbox():``. What is done to sandboxed values inside is undone.

    Another one inside it undoes its own part, and no more.
    """

    def __init__(self, lifespan: Lifespan, location: Site, *, workers: bool = True) -> None:
        self.location = location
        self.over: bool = False
        self._is_leaving = self._is_left = False
        self.works: bool = workers and lifespan.works
        self.lifespan = lifespan
        self._begun: list[tuple[str, Sandbox]] = []
        self._outer: Block | None = None  # of the context, which may be another lifespan's
        self._around: Block | None = None  # of the same lifespan
        self._patches: tuple[Lifespan, ...] = ()
        self._ended: anyio.Event | None = None  # for who waits until it has been left

    async def __aenter__(self) -> Self:
        """Begin.

        Raises:
            SandboxError: The lifespan was not opened for it.
            SandboxBusyError: It is in a block that this code was not started in.
            SandboxUnsupportedError: It is in a block, and a value can't be in two.
        """
        lifespan = self.lifespan
        if self._is_leaving or self._begun:
            raise SandboxError(f"the sandbox at {self.location} was entered before: make another one")
        if not lifespan.sandboxed:
            raise SandboxError(
                f"the lifespan made at {lifespan.location} did not open its values sandboxed. Open it "
                "inside `with lifekit.testing.sandboxing():`, or use `lifekit.testing.client(app, "
                "sandbox=True)`, or the fixtures of lifekit's pytest plugin."
            )
        self._outer, self._around = current_block.get(), lifespan.block
        if self._around is not None:
            self._check_inside(self._around)
        lifespan.block = self
        self._patches = lifespan.patches
        current_block.set(self)
        try:
            for name, sandbox in self._sandboxes():
                await self.begin(name, sandbox)
            if self._around is not None and self._around.works:
                self._raise(await self._around._end_work())
            if self.works:
                await self._begin_work()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    def _sandboxes(self) -> Iterator[tuple[str, Sandbox]]:
        if self.lifespan.postgres is not None:
            yield "PostgreSQL", self.lifespan.postgres
        for each in (self.lifespan, *self.lifespan.patches):
            yield from each.sandboxes()

    def _check_inside(self, around: Block) -> None:
        lifespan = self.lifespan
        if around._is_leaving or not around.contains(self._outer):
            raise SandboxBusyError(
                f"the lifespan made at {lifespan.location} is in the sandbox at {around.location}, and "
                f"the one at {self.location} was not entered by code that was started inside that. "
                "Leave the first one before the second one begins. Tests that run at once need a "
                "lifespan each."
            )
        for name, sandbox in self._sandboxes():
            if not sandbox.nests:
                raise SandboxUnsupportedError(
                    f"the sandbox at {self.location} can't begin inside the one at {around.location}: "
                    f"the sandbox of {name} undoes one block at a time. Override {name} in the "
                    "outer one."
                )

    def contains(self, other: Block | None) -> bool:
        """Return whether *other* is this block, or was begun inside it."""
        while other is not None and other is not self:
            other = other._outer
        return other is self

    def is_outside(self, other: Block | None) -> bool:
        """Return whether code that was started in *other* is none of this block's."""
        if other is None:
            return True
        around = self._around
        return around is not None and around.contains(other) and not self.contains(other)

    async def begin(self, name: str, sandbox: Sandbox) -> None:
        """Begin for one value, as the block begins or as an override opens it."""
        self._begun.append((name, sandbox))
        here = current_block.get()
        current_block.set(self)  # an override's own task may have been started elsewhere
        try:
            await sandbox.begin()
        finally:
            current_block.set(here)

    async def end(self, sandbox: Sandbox) -> None:
        """End for one value, which closes before the block ends; in the blocks around it as well."""
        leaving = [each for each in self._begun if each[1] is sandbox]
        self._begun = [each for each in self._begun if each[1] is not sandbox]
        try:
            await self._end(leaving)
        finally:
            if self._around is not None:
                await self._around.end(sandbox)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Undo everything.

        Raises:
            SandboxEscapedError: Something is still in use, or could not be undone. Where the body
                itself failed, that error gets it as a note.
            SandboxError: A block inside it was still in use. It ended with this one.
            CrashError: A worker has crashed; likewise.
        """
        if self._is_leaving:
            return
        self._is_leaving = True
        if current_block.get() is self:
            outer = self._outer
            while outer is not None and outer._is_leaving:  # which ended first
                outer = outer._outer
            current_block.set(outer)
        try:
            await self._end_all()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(
                f"lifekit: and its sandbox ended with {summary(failure)}\n{text_of(failure)}"
            )
        finally:
            self.lifespan.block = self._around
            self._is_left = True
            if self._ended is not None:
                self._ended.set()

    async def _end_all(self) -> None:
        inner = self.lifespan.block
        if inner is not None and inner is not self:
            try:
                if inner._is_leaving and not inner._is_left:  # another task is about to leave it
                    inner._ended = anyio.Event()
                    await sit_out(inner._ended)
                await inner.__aexit__(None, None, None)
            finally:
                await self._end_all()
            raise SandboxError(
                f"the sandbox at {self.location} was left while the one at {inner.location} inside it "
                "was in use, which ended with it. Leave the inner one first."
            )
        left = [each for each in self.lifespan.patches if each not in self._patches]
        try:
            if left:
                from .patching import undo  # here, for production never needs it

                await undo(self.lifespan, left[0])
        finally:
            failures = await self._end_work()
            self.over = True  # until then workers may end what they are at
            try:
                await self._end(self._begun)
            except Exception as failure:
                failures.append(failure)
            if self._around is not None and self._around.works and not self._around._is_leaving:
                await self._around._begin_work()
            self._raise(failures)
        if left:
            raise SandboxEscapedError(
                f"when the sandbox ended, the override made at {left[0].location} was still in use, "
                "and would have served the next test: leave it in the test, with `async with`."
            )

    async def _begin_work(self) -> None:
        layers = self.lifespan._layers()  # pyright: ignore[reportPrivateUsage]
        if any(layer.crew for layer in layers):
            from .resting import crew_of, resume  # here, for production never needs it

            await resume(crew_of(layers), layers)

    async def _end_work(self) -> list[Exception]:
        """End the workers; return what crashed, and what did not end."""
        layers, failures = self.lifespan._layers(), list[Exception]()  # pyright: ignore[reportPrivateUsage]
        if any(layer.crew for layer in layers):
            from .resting import crew_of, suspend

            known = [(layer.close_failures, len(layer.close_failures)) for layer in layers]
            try:
                interrupt = await suspend(crew_of(layers))
                exits = [layer.interrupts.pop() for layer in layers if layer.interrupts]
                if interrupt is not None or exits:
                    raise interrupt or exits[0]
            except BaseException:
                self.over = self._is_leaving
                await self._end(self._begun)  # what was done is undone all the same
                raise
            for failed, before in known:
                failures += [error for _, _, error in failed[before:]]
                del failed[before:]
        crashes = self.lifespan.crashes
        for layer in layers:
            crashes += layer.died_in_block()
        if crashes:
            failures.append(CrashError.of(self.lifespan.registry.name, crashes))
            crashes.clear()
        return failures

    def _raise(self, failures: list[Exception]) -> None:
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup(f"the sandbox at {self.location} ended with failures", failures)

    async def _end(self, begun: list[tuple[str, Sandbox]]) -> None:
        seconds = self.lifespan.registry.close_timeout
        failures: list[Exception] = []
        interrupt: BaseException | None = None
        _end_at_once(begun, failures)
        while begun:
            limit = TimeLimit(seconds)
            outcome = await undisturbed(_end_each(begun, failures, limit), limit)
            interrupt = interrupt or outcome.interrupt or outcome.error
            if begun:  # it was stopped there
                name, sandbox = begun.pop()
                sandbox.terminate()
                if not outcome.in_time:
                    why = f"{name}: undoing took longer than {seconds:.3g} s, so that it was cut off"
                    failures.append(SandboxEscapedError(why))
        if interrupt is not None:
            for failure in failures:
                interrupt.add_note(
                    f"lifekit: and the sandbox ended with {summary(failure)}\n{text_of(failure)}"
                )
            raise interrupt
        self._raise(failures)


def _end_at_once(begun: list[tuple[str, Sandbox]], failures: list[Exception]) -> None:
    """Undo in reverse order, up to the first that has to wait for something."""
    while begun:
        try:
            if not begun[-1][1].end_at_once():
                return
        except Exception as error:
            failures.append(_redacted(error))
        begun.pop()


async def _end_each(
    begun: list[tuple[str, Sandbox]], failures: list[Exception], limit: TimeLimit
) -> None:
    """Undo in reverse order; where that is stopped, at the last one left."""
    while begun:
        limit.restart()
        try:
            await begun[-1][1].end()
        except Exception as error:
            failures.append(_redacted(error))
        begun.pop()
        _end_at_once(begun, failures)


def _redacted(error: Exception) -> Exception:
    from .stand_in import redact_error  # here, so that an import of lifekit costs little

    return cast("Exception", redact_error(error))
