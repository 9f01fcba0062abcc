"""A worker's own task: runs it, again where its rules say so, until it is told to end.

As a resource's task does, it reports to the owner, in `engine.py`, who tells it to end and gives it
the time for that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from anyio import CancelScope, create_task_group, get_cancelled_exc_class

from lifekit import events
from lifekit._util.loops import uncancel

from .errors import DeclarationError, LifekitError, is_a, summary, without
from .leading import Term, acquire, give_up, lead, lead_alone, lock_of
from .life import Life
from .node import Node
from .resource import Resource
from .worker import Supervision, Worker, WorkerStatus

if TYPE_CHECKING:
    from .drivers import Lock  # by which it leads
    from .engine import Engine  # which spawns it, and to which it reports


class Working(Life):
    """What the task of one worker does in one run."""

    def __init__(self, owner: Engine, node: Node) -> None:
        super().__init__(owner, node)
        assert isinstance(node.declaration, Worker)
        assert node.worker is not None
        self._rules = node.declaration.rules
        self._status: WorkerStatus = node.worker
        self._term: Term | None = None  # in which it leads
        self._told = ""

    async def _life(self) -> None:
        if self._rules.leader is None:
            await self._work()
        else:
            with self.node.closing_scope:
                await self._lead(self._rules.leader)
        self._report(self.owner.ended, None)

    async def _lead(self, leader: Resource[Any]) -> None:
        declaration = self.node.declaration
        if self.owner.block() is not None or leader in self.owner.replaced():
            async with lead_alone(declaration.name):
                await self._work()
            return
        key = f"{declaration.registry.name}.{declaration.name}"
        try:
            lock = lock_of(self.owner.values[leader], key, declaration.name)
            while (acquired := await self._standby(lock)) is not None:
                async with lead(lock, declaration.name, acquired) as self._term:
                    self._tell(events.Leading, acquired[0])
                    await self._work()
                if self._term.lost is None:
                    return
                self._tell(events.LeadershipLost, acquired[0], self._term.lost)
        except DeclarationError as error:
            self._status.state, self._status.last_error = "crashed", error
            self._report(self.owner.failed, (error, None))
            self._report(self.owner.crashed, error)

    async def _standby(self, lock: Lock) -> tuple[int, float] | None:
        """Wait until it leads; None is that it is to end."""
        acquired: tuple[int, float] | None = None
        self._status.state = "standby"
        try:
            async with create_task_group() as tasks:
                tasks.start_soon(self._cancel_at_notice, tasks.cancel_scope)
                acquired = await acquire(lock, self._waits)
                tasks.cancel_scope.cancel()
        except BaseException:
            await give_up(lock)
            raise
        return acquired

    async def _cancel_at_notice(self, scope: CancelScope) -> None:
        await self.node.notice.wait()
        scope.cancel()

    def _waits(self, error: Exception) -> None:
        if (told := summary(error)) != self._told:
            self._told = told
            events.logger.warning(f"{self.node.declaration.name} can't tell yet who leads: {told}")

    def _tell(self, kind: Callable[..., events.Event], *what: object) -> None:
        tell = self.owner.tell
        self._report(lambda node, _: tell(kind, node.resource.name, *what), None)

    def _is_over(self) -> bool:
        return self.node.asked or (self._term is not None and self._term.lost is not None)

    async def _work(self) -> None:
        supervision = Supervision(self._rules)
        while True:
            self._status.state = "running"
            began = self.time.now()
            error = await self._run()
            now = self.time.now()
            if self.node.asked:
                if error is not None:
                    self._report(self.owner.close_failed, ("close", error))
                return
            if self._is_over():
                if error is not None:
                    self._report(self.owner.failed, (error, 0.0))
                return
            if error is None:
                delay = supervision.returned(now - began)
                if delay is None or self.node.notice.is_set():
                    self._status.state = "ended"
                    return
                self._status.state = "waiting"
            elif not is_a(error, Exception):  # KeyboardInterrupt and its like
                self._status.state = "ended"
                self.owner.interrupt(error)
                return
            else:
                self._status.last_error = error
                delay = supervision.failed(now - began, now)
                self._status.state = "crashed" if delay is None else "restarting"
                self._report(self.owner.failed, (error, delay))
                if delay is None:
                    self._report(self.owner.crashed, error)
                    return
            if await self._told_within(delay):
                return
            self._status.restarts += self._rules.every is None or error is not None
            if self._rules.leader is None:  # a scope is entered once
                self.node.closing_scope = self.owner.scope()

    async def _run(self) -> BaseException | None:
        # What it failed with, without a cancellation that lifekit asked for.
        declaration = self.node.declaration
        error: BaseException | None = None
        needs = [self.node.values[need] for need in declaration.needs]
        # A leader is ended while it waits as well: there the owner's scope is around all.
        scope = self.node.closing_scope if self._rules.leader is None else self.owner.scope()
        try:
            with scope:  # which can't be left while the run's own are open
                try:
                    await cast("Awaitable[Any]", declaration.factory(*needs))
                except GeneratorExit:
                    raise
                except BaseException as raised:
                    error = raised
        except RuntimeError as broken:
            left = LifekitError(_LEFT_OPEN.format(name=declaration.name))
            left.__cause__ = error or broken
            self._report(self.owner.died, self._redacted(left))
            raise  # to end this task, at whose end it is told again
        if error is None:
            return None
        real = without(error, get_cancelled_exc_class())
        if real is None and not self._is_over():
            uncancel(self.node.task)
            real = LifekitError(f"{declaration.name} was cancelled, not by lifekit")
            real.__cause__ = error
        return None if real is None else self._redacted(real)

    async def _told_within(self, seconds: float) -> bool:
        """Wait for so long, or until the worker is to run no more; return whether it is."""
        # Told of the stop, what runs now and then does not begin once more; what failed does.
        waits = self._status.state == "waiting"
        told = self.node.notice.wait if waits else self.node.wake.wait
        until = self.time.now() + seconds
        while not (self._is_over() or (waits and self.node.notice.is_set())):
            try:
                with CancelScope(deadline=until):
                    await told()
                if self.time.now() >= until:
                    return self._is_over()
            except get_cancelled_exc_class():
                if not self._is_over():  # whoever it was: nothing runs that could be cancelled
                    uncancel(self.node.task)
        return True


_LEFT_OPEN = (
    "{name} left a cancel scope or a task group open when its run ended, and can't be run again in a "
    "task where it stays open. Open it by `with`, or `async with`, inside the worker's function."
)
