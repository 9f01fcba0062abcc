"""Test mode's side of a lifespan: who opens sandboxed, and one block in which everything is undone."""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from ._backend import TimeLimit, undisturbed
from ._errors import SandboxBusyError, SandboxError, SandboxEscapedError, summary, text_of
from ._stack import Site

if TYPE_CHECKING:
    from ._lifespan import Lifespan
    from .drivers import Sandbox


class Sandboxing:
    """Lifespans that are opened in its context open sandboxed, and are noted here."""

    def __init__(self) -> None:
        self.lifespans: list[Lifespan] = []


sandboxing: ContextVar[Sandboxing | None] = ContextVar("lifekit.sandboxing", default=None)
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
    """One ``async with lifespan.sandbox():``. What is done to sandboxed values inside is undone."""

    def __init__(self, lifespan: Lifespan, location: Site) -> None:
        self.location = location
        self.over: bool = False
        self.lifespan = lifespan
        self._begun: list[tuple[str, Sandbox]] = []
        self._outer: Block | None = None
        self._patches: tuple[Lifespan, ...] = ()

    async def __aenter__(self) -> Self:
        """Begin.

        Raises:
            SandboxError: The lifespan was not opened for it.
            SandboxBusyError: It is in another block.
        """
        lifespan = self.lifespan
        if self.over or self._begun:
            raise SandboxError(f"the sandbox at {self.location} was entered before: make another one")
        if not lifespan.sandboxed:
            raise SandboxError(
                f"the lifespan made at {lifespan.location} did not open its values sandboxed. Open it "
                "inside `with lifekit.testing.sandboxing():`, or use `lifekit.testing.client(app, "
                "sandbox=True)`, or the fixtures of lifekit's pytest plugin."
            )
        if lifespan.block is not None:
            raise SandboxBusyError(
                f"the lifespan made at {lifespan.location} is in the sandbox at "
                f"{lifespan.block.location} already, and has one at a time: leave that before "
                f"this one, at {self.location}, begins. Tests that run at once want a lifespan each."
            )
        lifespan.block = self
        self._patches = lifespan.patches
        self._outer = current_block.get()
        current_block.set(self)
        try:
            if lifespan.postgres is not None:
                await self.begin("PostgreSQL", lifespan.postgres)
            for each in (lifespan, *lifespan.patches):
                for name, sandbox in each.sandboxes():
                    await self.begin(name, sandbox)
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def begin(self, name: str, sandbox: Sandbox) -> None:
        """Begin for one value, as the block begins or as an override opens it."""
        self._begun.append((name, sandbox))
        await sandbox.begin()

    async def end(self, sandbox: Sandbox) -> None:
        """End for one value, which closes before the block ends."""
        leaving = [each for each in self._begun if each[1] is sandbox]
        self._begun = [each for each in self._begun if each[1] is not sandbox]
        await self._end(leaving)

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
        """
        if self.over:
            return
        self.over = True
        if current_block.get() is self:
            outer = self._outer
            while outer is not None and outer.over:  # which ended first
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
            self.lifespan.block = None

    async def _end_all(self) -> None:
        left = [each for each in self.lifespan.patches if each not in self._patches]
        try:
            if left:
                await self.lifespan.undo(left[0])
        finally:
            await self._end(self._begun)
        if left:
            raise SandboxEscapedError(
                f"when the sandbox ended, the override made at {left[0].location} was still in use, "
                "and would have served the next test: leave it in the test, with `async with`."
            )

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
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup(f"the sandbox at {self.location} ended with failures", failures)


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


def _redacted(error: Exception) -> Exception:
    from ._stand_in import redact_error  # here, so that an import of lifekit costs little

    return cast("Exception", redact_error(error))
