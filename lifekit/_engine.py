"""The engine: everything that opens, rolls back, closes and keeps deadlines is in this file.

Each resource has one task, which opens it, parks, and closes it. One more task, the owner, decides:
it starts a resource's task when all its parents are open, asks it to close when all its children
have ended, cuts it off at its deadline, and leaves it behind when it ignores even that. The task of
a resource only reports; every change of state is made in the owner's `_turn`, which has no await.
"""

from __future__ import annotations

import heapq
import logging
import random
from collections.abc import Callable
from functools import partial
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Any, cast

import anyio
from anyio import CancelScope, get_cancelled_exc_class

from . import drivers, events
from ._backend import clock, spawn
from ._closing import Call, Live, settle
from ._errors import DeadlineError, LifekitError, Phase, summary
from ._graph import Plan
from ._node import RUNNING, Node, State
from ._redact import redact_error
from ._resource import Resource
from ._stack import waiting_at
from ._timeline import Timeline, timeline
from ._transient import is_transient

if TYPE_CHECKING:
    from ._sandbox import Block

LAST_CALL = 1.0
"""Seconds that a closing has to end after it was cancelled, and that a terminate has in all."""

Failure = tuple[str, str, Exception]
"""A resource's name, its code line, what it failed with."""


class Engine:
    """One run of a plan: the tasks that own its values."""

    task: object

    def __init__(
        self,
        name: str,
        plan: Plan,
        values: dict[Resource[Any], Any],
        *,
        start_timeout: float,
        close_timeout: float,
        grace: float,
        sandboxed: bool,
        block: Callable[[], Block | None],
        on_event: Callable[[events.Event], object] | None,
        on_finished: Callable[[], None],
    ) -> None:
        """Prepare a run; *values* may already hold some, which this run uses and leaves alone."""
        self.name, self.plan, self.values = name, plan, values
        self.sandboxed, self._block = sandboxed, block
        self.start_timeout, self.close_timeout, self.grace = start_timeout, close_timeout, grace
        resources = plan.resources
        self.nodes = [
            Node(
                resource,
                plan.declarations[index],
                index,
                sum(resources[at] not in values for at in parents),
            )
            for index, (resource, parents) in enumerate(zip(resources, plan.parents, strict=True))
        ]
        self.own = [node for node in self.nodes if node.resource not in values]
        self.ready = anyio.Event()  # all is open, or all has ended again
        self.finished = anyio.Event()
        self.stopping = False
        self.open_failures: list[Failure] = []
        self.cut_off: list[str] = []
        """What was opening still when something else failed."""
        self.close_failures: list[Failure] = []
        self.interrupts: list[BaseException] = []  # what must be delivered as it is
        self.began = self.stop_began = 0.0
        self.now = clock()
        self._on_event, self._on_finished = on_event, on_finished
        self._heard = on_event is not None or events.logger.isEnabledFor(logging.INFO)
        self._heard &= bool(self.own) or not values  # else all is open already
        self._stop_asked = False
        self._unopened, self._running = len(self.own), 0
        self._tasks: list[object] = []  # asyncio itself does not keep them
        self._reports: list[tuple[Node, Callable[[Node, Any], None], object]] = []
        self._alarms: list[tuple[float, int]] = []
        self._next_alarm = -inf
        self._bell = anyio.Event()

    def start(self) -> None:
        """Spawn the owner."""
        self.task = spawn(self._own(), f"lifekit {self.name}", self._never_ran)

    def stop(self) -> None:
        """Ask for the end; while it still starts, for the rollback."""
        self._stop_asked = True
        self._bell.set()

    def start_timeline(self) -> Timeline:
        """Return how the start went."""
        times = [(node.open_began, node.opened_at) for node in self.nodes]
        return timeline(f"start of {self.name}", self._names, times, self.plan.parents, self.began)

    def stop_timeline(self) -> Timeline:
        """Return how the stop went."""
        times = [(node.close_began, node.closed_at) for node in self.nodes]
        # What failed to open was closed before the stop that it caused.
        began = min([self.stop_began, *(begin for begin, _ in times if begin is not None)])
        title = f"stop of {self.name}"
        return timeline(title, self._names, times, self.plan.children, began, last_first=True)

    def opened(self) -> list[str]:
        """Return the names of what had opened."""
        return [node.resource.name for node in self.own if node.asked]

    def not_begun(self) -> list[str]:
        """Return the names of what never began to open."""
        return [node.resource.name for node in self.own if node.state is State.WAITING]

    def sandboxes(self) -> list[tuple[str, drivers.Sandbox]]:
        """Return the names and sandboxes of the open values that have one, what others need first."""
        return [
            (node.resource.name, node.live.sandbox)
            for node in sorted(self.own, key=lambda node: node.opened_at or inf)
            if node.state is State.OPEN and node.live is not None and node.live.sandbox is not None
        ]

    @property
    def _names(self) -> list[str]:
        return [resource.name for resource in self.plan.resources]

    def _emit(self, event: events.Event) -> None:
        try:
            events.log(event)
            if self._on_event is not None:
                self._on_event(event)
        except Exception as error:
            redact_error(error)
            events.logger.exception(f"on_event of {self.name} failed at {type(event).__name__}")
        except BaseException as error:
            self.interrupts.append(error)
            self.stop()

    # -- the owner ------------------------------------------------------------------------------

    async def _own(self) -> None:
        try:
            self.began = self.now()
            for node in self.own:
                if node.pending == 0:
                    self._begin(node)
            if not self.own:
                self._all_open()
            while not (self.stopping and self._running == 0):
                await self._sleep()
                try:
                    self._turn()
                except Exception as error:  # no fault in one resource may leave the others open
                    self.interrupts.append(error)
                    self._stop_asked = True
            if self._heard:
                self._emit(events.Stopped(self.name, self.stop_timeline()))
        finally:
            self._on_finished()
            self.ready.set()
            self.finished.set()

    def _never_ran(self) -> None:
        self.stopping = True
        self._on_finished()
        self.ready.set()
        self.finished.set()

    def _never_began(self, node: Node) -> None:
        came = None if node.scope.cancel_called else LifekitError(f"{node.resource.name} was cancelled")
        self._report(node, self._open_failed, came)
        self._report(node, self._ended, None)

    async def _sleep(self) -> None:
        # Until the stop the owner lets itself be cancelled: that is how an event loop which ends
        # under an open lifespan asks for it. From then on nothing may hurry it.
        self._next_alarm = self._alarms[0][0] if self._alarms else inf
        try:
            with CancelScope(deadline=self._next_alarm, shield=self._stop_asked):
                await self._bell.wait()
        except GeneratorExit:  # the loop was closed under it, and nothing can be awaited any more
            raise
        except BaseException as error:
            self._stop_asked = True
            if not isinstance(error, get_cancelled_exc_class()):
                self.interrupts.append(error)
        self._next_alarm = -inf  # while it is awake nobody needs to wake it
        if self._bell.is_set():
            self._bell = anyio.Event()

    def _turn(self) -> None:
        overdue: list[tuple[float, int]] = []
        while self._alarms and self._alarms[0][0] <= self.now():
            overdue.append(heapq.heappop(self._alarms))
        # In declaration order, so that every run of one plan tells the same story.
        reports, self._reports = self._reports, []
        for node, happened, what in sorted(reports, key=lambda report: report[0].index):
            if node.state is not State.ENDED:
                happened(node, what)
        for when, index in overdue:
            if self.nodes[index].alarm == when:
                self._overdue(self.nodes[index])
        if self._stop_asked and not self.stopping:
            self._begin_stop()

    def _begin(self, node: Node) -> None:
        node.state = State.OPENING
        node.open_began = self.now()
        self._running += 1
        if self._heard:
            self._emit(events.Opening(self.name, node.resource.name))
        self._arm(node, self._start_seconds(node))
        node.scope, node.closing_scope = CancelScope(shield=True), CancelScope()
        node.coroutine = self._guarded_life(node)
        name = f"lifekit {self.name}.{node.resource.name}"
        node.task = spawn(node.coroutine, name, lambda: self._never_began(node))

    def _opened(self, node: Node, live: Live) -> None:
        node.state = State.OPEN
        node.alarm = inf
        if not live.closes:  # its task is over
            del node.task, node.coroutine, node.scope, node.closing_scope
        # The one place where a value becomes visible, before anything that needs it begins.
        self.values[node.resource] = live.value
        if self._heard:
            seconds = _between(node.open_began, node.opened_at)
            self._emit(events.Opened(self.name, node.resource.name, seconds, live.describe()))
        self._unopened -= 1
        for index in self.plan.children[node.index]:
            child = self.nodes[index]
            child.pending -= 1
            if child.pending == 0 and not self._stop_asked and child.resource not in self.values:
                self._begin(child)
        if self._unopened == 0 and not self._stop_asked:
            self._all_open()

    def _all_open(self) -> None:
        self._alarms.clear()
        if self._heard:
            self._emit(events.Started(self.name, self.start_timeline()))
        self.ready.set()

    def _open_failed(self, node: Node, error: BaseException | None) -> None:
        node.state = State.CLOSING
        name = node.resource.name
        self._emit(events.OpenFailed(self.name, name, _between(node.open_began, node.opened_at), error))
        if node.live is not None and node.live.is_open:
            self._emit(events.Closing(self.name, name))
        if error is None:
            self.cut_off.append(name)
        else:
            self._record(self.open_failures, node, error)
            self._stop_asked = True

    def _retrying(self, node: Node, failure: tuple[int, float, Exception]) -> None:
        self._emit(events.Retrying(self.name, node.resource.name, *failure))

    def _begin_stop(self) -> None:
        self.stopping = True
        self.stop_began = self.now()
        if self._heard:
            self._emit(events.Stopping(self.name))
        for node in self.own:
            children = (self.nodes[index] for index in self.plan.children[node.index])
            node.pending = sum(child.state in RUNNING for child in children)
        for node in reversed(self.own):
            if node.state is State.OPENING and node.cut is None:
                self._arm(node, self._close_seconds(node))
                node.scope.cancel()
            elif node.state is State.OPEN and node.pending == 0:
                self._ask_to_close(node)

    def _ask_to_close(self, node: Node) -> None:
        node.state = State.CLOSING
        node.close_began = self.now()
        del self.values[node.resource]
        if self._heard:
            self._emit(events.Closing(self.name, node.resource.name))
        self._arm(node, self._close_seconds(node))
        node.asked = True
        if node.live is not None and node.live.closes:
            node.wake.set()
        else:
            self._report(node, self._ended, None)

    def _close_failed(self, node: Node, failure: tuple[Phase, BaseException]) -> None:
        phase, error = failure
        node.clean = False
        self._record(self.close_failures, node, error)
        self._emit(events.CloseFailed(self.name, node.resource.name, phase, error))

    def _terminated(self, node: Node, _: None) -> None:
        self._emit(events.Terminated(self.name, node.resource.name))

    def _ended(self, node: Node, _: None) -> None:
        node.state = State.ENDED
        node.alarm = inf
        node.closed_at = self.now()
        self._running -= 1
        if self._heard and node.live is not None and node.live.is_open:
            seconds = _between(node.close_began, node.closed_at)
            self._emit(events.Closed(self.name, node.resource.name, seconds, node.clean))
        if not node.left:  # else its task may still need it
            node.live = None
        if self.stopping:  # else the count is made when the stop begins
            for index in reversed(self.plan.parents[node.index]):
                parent = self.nodes[index]
                parent.pending -= 1
                if parent.pending == 0 and parent.state is State.OPEN:
                    self._ask_to_close(parent)

    def _overdue(self, node: Node) -> None:
        told_to_end = node.cut is not None or (node.state is State.OPENING and self.stopping)
        if told_to_end or node.left:
            self._leave_behind(node)
        elif node.state is State.OPENING:
            node.cut = self._deadline_error(node)
            self._arm_at(node, self.now() + self._close_seconds(node))
            node.scope.cancel()
            if node.closing_scope.shield:  # between two attempts
                node.closing_scope.cancel()
        else:
            node.cut = self._deadline_error(node)
            self._arm_at(node, self.now() + LAST_CALL)
            node.closing_scope.cancel()

    def _leave_behind(self, node: Node) -> None:
        if node.left:  # its terminate hangs as well
            self._ended(node, None)
            return
        error = self._deadline_error(node, abandoned=True)
        if node.state is State.OPENING:
            node.opened_at = self.now()
            self._open_failed(node, error)
        else:
            self._close_failed(node, (node.phase, error))
        live = node.live
        if live is None or not live.terminate or node.phase == "terminate":
            self._ended(node, None)
        else:
            self._terminated(node, None)
            self._arm(node, 2 * LAST_CALL)
            self._tasks.append(
                spawn(self._terminate(node, live.terminate), f"lifekit {node.resource.name}")
            )
        node.left = True
        node.live = live  # its task still has it, and closes it should the opening ever succeed

    def _record(self, failures: list[Failure], node: Node, error: BaseException) -> None:
        if isinstance(error, Exception):
            failures.append((node.resource.name, node.declaration.location, error))
        else:
            self.interrupts.append(error)

    def _deadline_error(self, node: Node, *, abandoned: bool = False) -> DeadlineError:
        cut_short = node.phase != "terminate" and node.armed_for < self._timeout(node)
        return DeadlineError(
            resource=node.resource.name,
            location=node.declaration.location,
            phase=node.phase,
            seconds=node.armed_for,
            grace=self.grace if self.stopping and cut_short else None,
            stack=waiting_at(node.coroutine),
            holders=node.live.holders() if node.live is not None else (),
            abandoned=abandoned,
        )

    # -- time -----------------------------------------------------------------------------------

    def _arm(self, node: Node, seconds: float) -> None:
        node.armed_for = seconds
        self._arm_at(node, self.now() + seconds)

    def _arm_at(self, node: Node, when: float) -> None:
        if node.left:
            return
        node.alarm = when
        if when < inf:
            heapq.heappush(self._alarms, (when, node.index))
            if when < self._next_alarm:
                self._bell.set()

    def _start_seconds(self, node: Node) -> float:
        declared = node.declaration.options.start_timeout
        return self.start_timeout if declared is None else declared

    def _close_seconds(self, node: Node) -> float:
        seconds = self._timeout(node)
        if self.stopping:
            seconds = min(seconds, max(0.0, self.stop_began + self.grace - self.now()))
        return seconds

    def _timeout(self, node: Node) -> float:
        declared = node.declaration.options.close_timeout
        return self.close_timeout if declared is None else declared

    # -- a resource's own task ------------------------------------------------------------------

    def _report(self, node: Node, happened: Callable[[Node, Any], None], what: object) -> None:
        if not node.left:  # else it speaks too late
            self._reports.append((node, happened, what))
            self._bell.set()

    async def _guarded_life(self, node: Node) -> None:
        try:
            await self._life(node)
        except GeneratorExit:
            raise
        except BaseException as error:
            # A factory, or a closing, left a scope of its own open in this task.
            redact_error(error)
            self._report(node, self._close_failed, (node.phase, error))
            self._report(node, self._ended, None)

    async def _life(self, node: Node) -> None:
        # Both scopes stand around the whole life, because a generator factory may have scopes of
        # its own open across its yield, and scopes must nest. The outer one ends an opening. The
        # inner one ends a closing, and shields it from an opening that was ended before.
        with node.scope, node.closing_scope:
            try:
                if not node.scope.cancel_called:  # else the stop came before its first step
                    await self._open(node)
                error = None
            except GeneratorExit:
                raise
            except BaseException as raised:
                error = raised
            node.opened_at = self.now()
            if error is None and node.opened_at > node.alarm and node.cut is None:
                node.cut = self._deadline_error(node)  # it never let go of the loop
            if error is None and not node.scope.cancel_called and node.cut is None:
                assert node.live is not None
                self._report(node, self._opened, node.live)
                if not node.live.closes:
                    return  # nothing is left for this task to do
                await self._park(node)
            else:  # it failed, or was cancelled, or it arrived too late
                reason = self._reason(node, error, cancelled=node.scope.cancel_called)
                self._report(node, self._open_failed, reason)
                del error
            if node.live is not None and node.live.closes:
                await self._close(node, node.live)
        self._report(node, self._ended, None)

    async def _open(self, node: Node) -> None:
        options = node.declaration.options
        until, seconds = node.alarm, node.armed_for
        for attempt in count(1):
            try:
                await self._try_to_open(node)
                return
            except Exception as error:
                # Twice as long each time, up to five seconds; anywhere in its upper half.
                delay = min(0.1 * 2 ** (attempt - 1), 5.0) * random.uniform(0.5, 1.0)
                if attempt > options.retry or not is_transient(error) or node.scope.cancel_called:
                    raise
                if self.now() + delay >= until:
                    error.add_note(f"lifekit gave up: no time left for attempt {attempt + 1}")
                    raise
                if (
                    node.live is not None
                    and node.live.is_made
                    and not await self._undo(node, node.live)
                ):
                    raise
                node.last_error = error
            self._report(node, self._retrying, (attempt, delay, node.last_error))
            node.armed_for = seconds
            self._arm_at(node, until)
            await anyio.sleep(delay)

    async def _try_to_open(self, node: Node) -> None:
        node.phase, node.live = "open", Live(node.declaration)
        try:
            needs = [self.values[need] for need in node.declaration.needs]
            await node.live.open(needs, sandboxed=self.sandboxed)
            if (block := self._block()) is not None and node.live.sandbox is not None:
                await block.begin(node.resource.name, node.live.sandbox)
            node.phase = "check"
            await node.live.check()
        except BaseException as error:
            for driver in drivers.loaded():
                try:
                    driver.salvage(error)
                except Exception as second:
                    events.logger.error(f"salvage of {type(driver).__name__} failed: {summary(second)}")
            raise

    async def _undo(self, node: Node, live: Live) -> bool:
        # Between two attempts: what the first one made is closed, and only then forgotten.
        clean = await self._close(node, live)
        node.closing_scope.shield = False
        node.close_began = None
        node.live = None
        return clean and not node.scope.cancel_called

    async def _park(self, node: Node) -> None:
        node.wake = anyio.Event()
        while not node.asked:
            try:
                # Shielded from the factory's own task group, which may be cancelled meanwhile: why,
                # comes out where the factory leaves it, at the closing.
                with CancelScope(shield=True):
                    await node.wake.wait()
            except GeneratorExit:
                raise
            except BaseException as error:
                if not isinstance(error, get_cancelled_exc_class()):
                    self.interrupts.append(error)
                    self.stop()

    async def _close(self, node: Node, live: Live) -> bool:
        node.closing_scope.shield = True
        node.close_began = self.now() if node.close_began is None else node.close_began
        if not node.asked:  # else the owner has set its alarm
            self._arm(node, self._close_seconds(node))
        if node.left:  # while it opened: nobody watches its time any more
            node.closing_scope.deadline = self.now() + LAST_CALL
        clean = True
        if (block := self._block()) is not None and live.sandbox is not None:
            clean = await self._step(node, "close", partial(block.end, live.sandbox))
        for phase, step in live.steps if live.is_open else ():
            # After a failure only a generator's end, or the exit of what was entered, must still come.
            if clean or (live.entered and step is live.steps[-1][1]):
                clean &= await self._step(node, phase, step)
        in_order = clean and live.is_open and live.flaw is None
        if live.terminate and not in_order and not node.left:
            self._report(node, self._terminated, None)
            self._arm(node, min(LAST_CALL, self._timeout(node)))
            around = node.closing_scope
            with CancelScope(shield=True, deadline=self.now() + 2 * LAST_CALL) as node.closing_scope:
                clean &= await self._step(node, "terminate", live.terminate)
            node.closing_scope = around
        return clean

    async def _terminate(self, node: Node, call: Call) -> None:
        # In a task of its own: that of the resource was left behind.
        try:
            with CancelScope(shield=True, deadline=self.now() + LAST_CALL):
                await settle(call())
        except GeneratorExit:
            raise
        except BaseException as error:
            redact_error(error)
            self._reports.append((node, self._close_failed, ("terminate", error)))
        self._reports.append((node, self._ended, None))
        self._bell.set()

    async def _step(self, node: Node, phase: Phase, step: Call) -> bool:
        node.phase = phase
        error: BaseException | None = None
        try:
            await settle(step())
        except GeneratorExit:
            raise
        except BaseException as raised:
            error = raised
        reason = self._reason(node, error, cancelled=False)
        if reason is not None:
            self._report(node, self._close_failed, (phase, reason))
        return reason is None

    def _reason(
        self, node: Node, error: BaseException | None, *, cancelled: bool
    ) -> BaseException | None:
        # A cancellation that lifekit asked for is no failure by itself: what it asked for it is.
        if error is not None:
            redact_error(error)
        ours = get_cancelled_exc_class()
        real = None if isinstance(error, ours) else error
        if isinstance(error, BaseExceptionGroup):
            real = cast("BaseExceptionGroup[BaseException]", error).split(ours)[1]
        if node.cut is not None:
            cut, node.cut = node.cut, None
            cut.__cause__ = real or node.last_error
            return cut
        if error is not None and real is None and not cancelled:
            real = LifekitError(f"{node.phase} of {node.resource.name} was cancelled, not by lifekit")
            real.__cause__ = error
        return real


def _between(began: float | None, ended: float | None) -> float:
    return 0.0 if began is None or ended is None else ended - began
