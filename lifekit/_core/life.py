"""A resource's own task: opens it, parks, and closes it.

It is the one task in which a factory's code runs, so that a scope which that holds open across its
yield is left where it was entered. It reports to the owner, in `engine.py`, and changes no state.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import anyio
from anyio import CancelScope, get_cancelled_exc_class

from lifekit import events
from lifekit._util.call_sites import held_by
from lifekit._util.loops import conceal, each_step, is_by_deadline, reveal, sheltered, uncancel

from . import drivers
from .errors import LifekitError, Phase, is_a, note_once, summary, without
from .node import Node, variables_set
from .stand_in import redact_error
from .transient import is_transient
from .value import Call, Live, settle

if TYPE_CHECKING:
    from .engine import Engine  # which spawns it, and to which it reports

LAST_CALL = 1.0
"""Seconds that a closing has to end after it was cancelled, and that a terminate has in all."""


class Life:
    """What the task of one resource does in one run."""

    def __init__(self, owner: Engine, node: Node) -> None:
        self.owner, self.node, self.time = owner, node, owner.time

    def _report(self, happened: Callable[[Node, Any], None], what: object) -> None:
        if not self.node.left:  # else it speaks too late
            self.owner.report(self.node, happened, what)

    async def run(self) -> None:
        """Open, park, close, each when the owner says so."""
        self.node.coroutine = self._life()
        try:
            await each_step(
                self.node.coroutine, self.time.begin_step, partial(self.time.charge, self.node)
            )
        except GeneratorExit:
            raise
        except BaseException as error:
            # A factory, or a closing, left a scope of its own open in this task.
            self._report(self.owner.died, self._redacted(error))
            self._report(self.owner.ended, None)

    async def _life(self) -> None:
        # Both scopes stand around the whole life, because a generator factory may have scopes of
        # its own open across its yield, and scopes must nest. The outer one ends an opening. The
        # inner one ends a closing, and shields it from an opening that was ended before.
        with self.node.scope, self.node.closing_scope:
            error: BaseException | None = None
            try:
                if not self.node.scope.cancel_called:  # else the stop came before its first step
                    await self._open()
                    self.node.variables = variables_set(self.node.context, copy_context())
            except GeneratorExit:
                raise
            except BaseException as raised:
                error = raised
            self.node.opened_at = self.time.now()
            if error is None and not self.node.scope.cancel_called and self.node.cut is None:
                assert self.node.live is not None
                self._report(self.owner.has_opened, self.node.live)
                if not self.node.live.closes:
                    return  # nothing is left for this task to do
                await self._park(self.node.live)
            else:  # it failed, or was cancelled, or it arrived too late
                reason = self._reason(error, cancelled=self.node.scope.cancel_called)
                self._report(self.owner.open_failed, reason)
                del error
            if self.node.live is not None and self.node.live.closes:
                await self._close(self.node.live)
        self._report(self.owner.ended, None)

    async def _open(self) -> None:
        options = self.node.declaration.options
        seconds = self.node.armed_for
        for attempt in count(1):
            try:
                await self._try_to_open()
                return
            except Exception as error:
                # Twice as long each time, up to five seconds; anywhere in its upper half.
                delay = min(0.1 * 2 ** (attempt - 1), 5.0) * random.uniform(0.5, 1.0)
                again = attempt <= options.retry and is_transient(error, options)
                if not again or self.node.scope.cancel_called:
                    raise
                if self.time.now() + delay >= (until := self.time.due(self.node)):
                    note_once(error, f"lifekit gave up: no time left for attempt {attempt + 1}")
                    raise
                if (
                    self.node.live is not None
                    and self.node.live.is_made
                    and not await self._undo(self.node.live)
                ):
                    raise
                self.node.last_error = self._redacted(error)
            self._report(self.owner.retrying, (attempt, delay, self.node.last_error))
            self.node.armed_for = seconds
            # As it was: between the attempts it had that of a closing.
            self.time.arm_at(self.node, until)
            await anyio.sleep(delay)

    async def _try_to_open(self) -> None:
        self.node.phase, self.node.live = "open", Live(self.node.declaration)
        try:
            needs = [self.node.values[need] for need in self.node.declaration.needs]
            others = self.node.values.values()
            await self.node.live.open(needs, others, self.owner.gateway)
            if (block := self.owner.block()) is not None and self.node.live.sandbox is not None:
                await block.begin(self.node.resource.name, self.node.live.sandbox)
            if not self._is_cut() and self.node.live.checks:
                self.node.phase = "check"
                await self.node.live.check()
                self._is_cut()
        except BaseException as error:
            for driver in drivers.loaded():
                try:
                    driver.salvage(error)
                except Exception as second:
                    events.logger.error(f"salvage of {type(driver).__name__} failed: {summary(second)}")
            raise

    def _is_cut(self) -> bool:
        # Of what blocks the loop the owner can't know in time.
        if self.node.cut is None and self.time.is_late(self.node):
            self.node.cut = self.owner.deadline_error(self.node)
        return self.node.cut is not None

    async def _undo(self, live: Live) -> bool:
        # Between two attempts: what the first one made is closed, and only then forgotten.
        clean = await self._close(live)
        reveal(self.node.task)
        sheltered.set(False)
        self.node.closing_scope.shield = False
        self.node.close_began = None
        self.node.live = None
        return clean and not self.node.scope.cancel_called

    async def _park(self, live: Live) -> None:
        self.node.wake = self.owner.event()
        shielded = not live.entered
        while not self.node.asked:
            try:
                # Of what a factory holds across its yield one cancellation is let through: a task
                # group of its own that dies has no other sign. Why, comes out at the closing.
                with self.owner.scope(shield=shielded):
                    await self.node.wake.wait()
            except GeneratorExit:
                raise
            except BaseException as error:
                if not is_a(error, get_cancelled_exc_class()):
                    self.owner.interrupt(error)
                    continue
                uncancel(self.node.task)
                if not (shielded or self.node.asked or _is_a_deadline(error, live)):
                    self.node.crashed = True
                    self._report(self.owner.crashed, None)
                shielded = True

    async def _close(self, live: Live) -> bool:
        # Nobody but the owner, and what the closing itself opens, may cancel it. The owner waits.
        conceal(self.node.task)
        sheltered.set(True)
        self.node.closing_scope.shield = True
        if self.node.close_began is None:
            self.node.close_began = self.time.now()
        if not self.node.asked:  # else the owner has set its alarm
            self.time.arm(self.node, self.owner.close_seconds(self.node))
        if self.node.left:  # while it opened: nobody watches its time any more
            self.node.closing_scope.deadline = self.time.now() + LAST_CALL
        clean = True
        if (block := self.owner.block()) is not None and live.sandbox is not None:
            clean = await self._step("close", partial(block.end, live.sandbox))
        for phase, step in live.steps if live.is_open else ():
            # After a failure only a generator's end, or the exit of what was entered, must still come.
            if clean or (live.entered and step is live.steps[-1][1]):
                clean &= await self._step(phase, step)
        in_order = clean and live.is_open and live.flaw is None
        if live.terminate and not in_order and not self.node.left:
            self._report(self.owner.terminated, None)
            self.time.arm(self.node, min(LAST_CALL, self.owner.timeout(self.node)))
            around = self.node.closing_scope
            until = self.time.now() + 2 * LAST_CALL
            with CancelScope(shield=True, deadline=until) as self.node.closing_scope:
                clean &= await self._step("terminate", live.terminate)
            self.node.closing_scope = around
        return clean

    async def _step(self, phase: Phase, step: Call) -> bool:
        self.node.phase = phase
        self.time.charge(self.node)
        blocked = self.node.blocked
        error: BaseException | None = None
        try:
            await settle(step())
        except GeneratorExit:
            raise
        except BaseException as raised:
            error = raised
        reason = self._reason(error, cancelled=False)
        if reason is not None:
            self._report(self.owner.close_failed, (phase, reason))
        elif self.time.is_late(self.node) and self.node.blocked > blocked:
            # It is done, but nobody could end it in time.
            self._report(self.owner.close_failed, (phase, self.owner.deadline_error(self.node)))
        return reason is None

    def _redacted(self, error: BaseException) -> BaseException:
        return redact_error(
            error, self.node.live, *map(self.node.values.get, self.node.declaration.needs)
        )

    def _reason(self, error: BaseException | None, *, cancelled: bool) -> BaseException | None:
        # A cancellation that lifekit asked for is no failure by itself: what it asked for it is.
        real = without(error, get_cancelled_exc_class()) if error is not None else None
        if real is not None:
            real = self._redacted(real)  # which takes time: not for a hundred cancelled at once
        if self.node.cut is not None:
            cut, self.node.cut = self.node.cut, None
            cut.__cause__ = self.node.last_error if real is None else real
            return cut
        if error is not None and real is None and not cancelled:
            real = LifekitError(
                f"{self.node.phase} of {self.node.resource.name} was cancelled, not by lifekit"
            )
            real.__cause__ = self._redacted(error)
        return real


def _is_a_deadline(error: BaseException, live: Live) -> bool:
    # One that a factory holds across its yield, and whose time is up: that may be as it is meant.
    if is_by_deadline(error):
        return True
    held = held_by(*getattr(live.steps[-1][1], "args", ()))
    return any(isinstance(each, asyncio.Timeout) and each.expired() for each in held)
