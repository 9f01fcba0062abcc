"""The engine: what opens, rolls back, closes and keeps deadlines is decided in this file.

Each resource has one task, in `_life.py`, which opens it, parks, and closes it. One more task, the
owner, decides: it starts a resource's task when all its parents are open, asks it to close when all
its children have ended, cuts it off at its deadline, and leaves it behind when it ignores even that.
The task of a resource only reports; every change of state is made in the owner's `_turn`, which has
no await.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, copy_context
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio
from anyio import CancelScope, get_cancelled_exc_class

from . import drivers, events
from ._backend import conceal, reveal, shelter, sheltered, spawn
from ._closing import Call, Live, reached_in, settle
from ._deadlines import BLOCKED, WORTH_SAYING, Deadlines
from ._errors import DeadlineError, LifekitError, Phase, is_a
from ._graph import Plan
from ._interrupts import hold, let_go
from ._life import LAST_CALL, Life
from ._node import RUNNING, Node, State, Variables
from ._resource import Resource
from ._stack import suspended_frames, waiting_at
from ._stand_in import redact_error
from ._timeline import Timeline, timeline

if TYPE_CHECKING:
    from ._lifespan import Lifespan
    from ._sandbox import Block

T = TypeVar("T")
NOWHERE: tuple[str, ...] = ()

OVERDUE = 5.0
"""Seconds after the grace of a shutdown from which on a signal's handler may interrupt what closes."""

Failure = tuple[str, str, Exception]
"""A resource's name, its code line, what it failed with."""


class Engine:
    """One run of a plan: the tasks that own its values."""

    task: object
    base: Context  # that of the owner, on which those of the resources stand

    def __init__(
        self,
        name: str,
        plan: Plan,
        values: dict[Resource[Any], Any],
        *,
        start_timeout: float,
        close_timeout: float,
        grace: float,
        lifespan: Lifespan,
        variables: Variables,
        gateway: drivers.Gateway | None,
        block: Callable[[], Block | None],
        on_event: Callable[[events.Event], object] | None,
        on_finished: Callable[[], None],
    ) -> None:
        """Prepare a run; *values* may already hold some, which this run uses and leaves alone.

        *variables* are context variables to set for all factories.
        """
        self.name, self.plan, self.values, self._lifespan = name, plan, values, lifespan
        self._given = variables
        self.gateway, self.block = gateway, block
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
        # AnyIO looks for its backend whenever one of these is made.
        self.event, self.scope = type(self.ready), type(CancelScope())
        self.finished = self.event()
        self.stopping = False
        self.open_failures: list[Failure] = []
        self.cut_off: list[str] = []
        """What was opening still when something else failed."""
        self.close_failures: list[Failure] = []
        self.interrupts: list[BaseException] = []  # what must be delivered as it is
        self.held_back: list[BaseException] = []  # likewise, once all is closed
        self.began = self.stop_began = 0.0
        self._on_event, self._on_finished = on_event, on_finished
        self._heard = on_event is not None or events.logger.isEnabledFor(logging.INFO)
        self._heard &= bool(self.own) or not values  # else all is open already
        self._stop_asked = False
        self._unopened, self._running = len(self.own), 0
        self._tasks: list[object] = []  # asyncio itself does not keep them
        self._reports: list[tuple[Node, Callable[[Node, Any], None], object]] = []
        self._told_of = 0
        self._bell = self.event()
        self.time = Deadlines(self.nodes, self._ring, self._blocked)
        self.now = self.time.now
        self._lost_before_stop = 0.0
        self._leave_shelter: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Spawn the owner."""
        self.task = spawn(self._own(), f"lifekit {self.name}", self._never_ran)

    def stop(self) -> None:
        """Ask for the end; while it still starts, for the rollback."""
        self._stop_asked = True
        self._bell.set()

    def _ring(self) -> None:
        self._bell.set()

    def interrupt(self, error: BaseException) -> None:
        """Stop, and deliver *error* then."""
        self.interrupts.append(error)
        self.stop()

    def lose(self) -> None:
        """Say what can't be closed any more: the loop was closed, and did not ask before."""
        left = self._left()
        if not self.finished.is_set() and left:
            told = f"the event loop was closed under the open lifespan of {self.name}"
            events.logger.error(f"{told}: never closed: {left}")
        self._finish()

    def _left(self) -> str:
        return ", ".join(node.resource.name for node in self.own if node.state in RUNNING)

    def _finish(self) -> None:
        if not self.finished.is_set():
            self._on_finished()
            self.ready.set()
            self.finished.set()

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

    @property
    def variables(self) -> Variables:
        """What factories set in their contexts, of those that set the same the last declared."""
        return tuple(each for node in self.own for each in node.variables)

    def _emit(self, kind: Callable[..., events.Event], *told: object) -> None:
        # Whatever a listener or a logging handler raises, the run goes on.
        try:
            event = kind(self.name, *told, lifespan=self._lifespan)
            events.log(event)
            if self._on_event is not None:
                began = self.now()
                self._on_event(event)
                self._blocked_by_listener(self.now() - began)
        except Exception as error:
            line = f"on_event of {self.name} failed at {kind.__name__}"
            with suppress(Exception):
                events.logger.error(line, exc_info=redact_error(error))
        except BaseException as error:
            self.interrupt(error)

    def _blocked_by_listener(self, seconds: float) -> None:
        if seconds >= BLOCKED:
            self.time.lost += seconds
        if seconds >= WORTH_SAYING:
            events.logger.warning(f"on_event of {self.name} blocked the event loop for {seconds:.2f} s")

    def _blocked(self, node: Node, seconds: float) -> None:
        stands = self._if_known(NOWHERE, _stands_at, node) or (node.declaration.location,)
        self._emit(events.Blocked, node.resource.name, node.phase, seconds, stands[0])

    # -- the owner ------------------------------------------------------------------------------

    async def _own(self) -> None:
        try:
            self.base = copy_context()
            for variable, value in self._given:
                self.base.run(variable.set, value)
            self.began = self.now()
            for node in self.own:
                if node.pending == 0:
                    self._begin(node)
            if not self.own:
                self._all_open()
            while not (self.stopping and self._running == 0):
                await self._sleep()
                self._turn()
            if self._heard:
                self._emit(events.Stopped, self.stop_timeline())
        except GeneratorExit:
            self.lose()
            raise
        finally:
            let_go(self)
            self._leave_shelter()
            self.interrupts += self.held_back
            self._finish()

    def _never_ran(self) -> None:
        self.stopping = True
        self._finish()

    def _never_began(self, node: Node) -> None:
        came = None if node.scope.cancel_called else LifekitError(f"{node.resource.name} was cancelled")
        self.report(node, self.open_failed, came)
        self.report(node, self.ended, None)

    async def _sleep(self) -> None:
        # Until the stop the owner lets itself be cancelled: that is how an event loop which ends
        # under an open lifespan asks for it. From then on nothing may hurry it.
        try:
            with self.scope(deadline=self.time.sleep(), shield=self._stop_asked):
                await self._bell.wait()
        except GeneratorExit:  # the loop was closed under it, and nothing can be awaited any more
            raise
        except BaseException as error:
            self._stop_asked = True
            if not is_a(error, get_cancelled_exc_class()):
                self.interrupts.append(error)
        self.time.awake()
        if self._bell.is_set():
            self._bell = self.event()

    def _turn(self) -> None:
        overdue = self.time.overdue()
        # In declaration order, so that every run of one plan tells the same story.
        reports, self._reports = self._reports, []
        for node, happened, what in sorted(reports, key=lambda report: report[0].index):
            if node.state is not State.ENDED:
                self._carry_out(happened, node, what)
        for node in overdue:
            self._carry_out(self._overdue, node)
        if self._stop_asked and not self.stopping:
            self._begin_stop()
        if len(self.held_back) > self._told_of:
            self._tell_of_held_back()

    def _carry_out(self, change: Callable[..., None], *what: object) -> None:
        try:
            change(*what)
        except GeneratorExit:
            raise
        except BaseException as error:  # no fault in one resource may leave the others open
            self.interrupts.append(error)
            self._stop_asked = True

    def _hold_back(self, error: BaseException) -> bool:
        # Called by a signal handler, amid anything. Where the end is long overdue something blocks the
        # loop, and whoever presses Ctrl-C means that.
        lost = self.time.lost - self._lost_before_stop
        if self.now() > self.stop_began + self.grace + lost + OVERDUE:
            return False
        self.held_back.append(error)
        return True

    def _tell_of_held_back(self) -> None:
        self._told_of = len(self.held_back)
        with suppress(Exception):
            events.logger.warning(
                f"{type(self.held_back[-1]).__name__} waits until {self.name} is closed, which takes "
                f"{self.grace:.3g} s at most: {self._left()} left"
            )

    def _begin(self, node: Node) -> None:
        node.state = State.OPENING
        node.open_began = self.now()
        self._running += 1
        if self._heard:
            self._emit(events.Opening, node.resource.name)
        self.time.arm(node, self._start_seconds(node))
        node.scope, node.closing_scope = self.scope(shield=True), self.scope()
        name = f"lifekit {self.name}.{node.resource.name}"
        life, context = Life(self, node).run(), self._context_for(node)
        node.task = spawn(life, name, lambda: self._never_began(node), context)

    def _context_for(self, node: Node) -> Context:
        # A copy for each: a generator may reset at its end what it set at its beginning.
        for index in self.plan.parents[node.index]:
            parent = self.nodes[index]
            node.inherited |= parent.inherited | dict(parent.variables)
        if not node.inherited:
            node.context = self.base
        else:
            node.context = self.base.copy()
            for variable, value in node.inherited.items():
                node.context.run(variable.set, value)
        return node.context.copy()

    def has_opened(self, node: Node, live: Live) -> None:
        """Show its value, and begin what waited for it."""
        node.state = State.OPEN
        node.alarm = inf
        if not live.closes:  # its task is over
            del node.task, node.coroutine, node.scope, node.closing_scope
        # The one place where a value becomes visible, before anything that needs it begins.
        self.values[node.resource] = live.value
        if self._heard:
            seconds = _between(node.open_began, node.opened_at)
            self._emit(events.Opened, node.resource.name, seconds, live.describe())
        self._unopened -= 1
        for index in self.plan.children[node.index]:
            child = self.nodes[index]
            child.pending -= 1
            if child.pending == 0 and not self._stop_asked and child.resource not in self.values:
                self._begin(child)
        if self._unopened == 0 and not self._stop_asked:
            self._all_open()

    def _all_open(self) -> None:
        self.time.clear()
        if self._heard:
            self._emit(events.Started, self.start_timeline())
        self.ready.set()

    def open_failed(self, node: Node, error: BaseException | None) -> None:
        """Record why it did not open, None where it was cancelled for another's sake."""
        node.state = State.CLOSING
        name = node.resource.name
        self._emit(events.OpenFailed, name, _between(node.open_began, node.opened_at), error)
        if node.live is not None and node.live.is_open:
            self._emit(events.Closing, name)
        if error is None:
            self.cut_off.append(name)
        else:
            self._record(self.open_failures, node, error)
            self._stop_asked = True

    def retrying(self, node: Node, failure: tuple[int, float, Exception]) -> None:
        """Tell that it is tried again."""
        self._emit(events.Retrying, node.resource.name, *failure)

    def _begin_stop(self) -> None:
        self.stopping = True
        self.stop_began = self.now()
        self._lost_before_stop = self.time.lost
        hold(self, self._hold_back)
        self._leave_shelter = shelter()
        if self._heard:
            self._emit(events.Stopping)
        for node in self.own:
            children = (self.nodes[index] for index in self.plan.children[node.index])
            node.pending = sum(child.state in RUNNING for child in children)
        for node in reversed(self.own):
            if node.state is State.OPENING and node.cut is None:
                self.time.arm(node, self.close_seconds(node))
                node.scope.cancel()
            elif node.state is State.OPEN and node.pending == 0:
                self._ask_to_close(node)

    def _ask_to_close(self, node: Node) -> None:
        node.state = State.CLOSING
        node.close_began = self.now()
        del self.values[node.resource]
        if self._heard:
            self._emit(events.Closing, node.resource.name)
        self.time.arm(node, self.close_seconds(node))
        node.asked = True
        if node.live is not None and node.live.closes:
            node.wake.set()
        else:
            self.report(node, self.ended, None)

    def close_failed(self, node: Node, failure: tuple[Phase, BaseException]) -> None:
        """Record which phase of its closing failed, and how."""
        phase, error = failure
        node.clean = False
        self._record(self.close_failures, node, error)
        self._emit(events.CloseFailed, node.resource.name, phase, error)

    def died(self, node: Node, error: BaseException) -> None:
        """Record what ended its task from outside of both."""
        if node.state is State.OPENING:
            self.open_failed(node, error)
        else:
            self.close_failed(node, (node.phase, error))

    def terminated(self, node: Node, _: None) -> None:
        """Tell that it is cut off."""
        self._emit(events.Terminated, node.resource.name)

    def ended(self, node: Node, _: None) -> None:
        """Close what waited for its end."""
        node.state = State.ENDED
        node.alarm = inf
        node.closed_at = self.now()
        self._running -= 1
        if self._heard and node.live is not None and node.live.is_open:
            seconds = _between(node.close_began, node.closed_at)
            self._emit(events.Closed, node.resource.name, seconds, node.clean)
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
            node.cut = self.deadline_error(node)
            self.time.arm_at(node, self.now() + self.close_seconds(node))
            node.scope.cancel()
            if node.closing_scope.shield:  # between two attempts
                node.closing_scope.cancel()
        else:
            node.cut = self.deadline_error(node)
            self.time.arm_at(node, self.now() + LAST_CALL)
            node.closing_scope.cancel()

    def _leave_behind(self, node: Node) -> None:
        if node.left:  # its terminate hangs as well
            self.ended(node, None)
            return
        error = self.deadline_error(node, abandoned=True)
        if node.state is State.OPENING:
            node.opened_at = self.now()
            self.open_failed(node, error)
        else:
            self.close_failed(node, (node.phase, error))
        live = node.live
        if live is None or not live.terminate or node.phase == "terminate":
            self.ended(node, None)
        else:
            self.terminated(node, None)
            self.time.arm(node, 2 * LAST_CALL)
            self._tasks.append(
                spawn(
                    self._terminate(node, live.terminate),
                    f"lifekit {node.resource.name}",
                    lambda: self.report(node, self.ended, None),
                )
            )
            conceal(self._tasks[-1])
        node.left = True
        reveal(node.task)  # nobody waits for it any more
        node.live = live  # its task still has it, and closes it should the opening ever succeed

    async def _terminate(self, node: Node, call: Call) -> None:
        # In a task of its own: that of the resource was left behind.
        sheltered.set(True)
        try:
            with CancelScope(shield=True, deadline=self.now() + LAST_CALL):
                await settle(call())
        except GeneratorExit:
            raise
        except BaseException as error:
            self.report(node, self.close_failed, ("terminate", redact_error(error, node.live)))
        self.report(node, self.ended, None)

    def _record(self, failures: list[Failure], node: Node, error: BaseException) -> None:
        if is_a(error, Exception):
            failures.append((node.resource.name, node.declaration.location, cast("Exception", error)))
        else:
            self.interrupts.append(error)

    def deadline_error(self, node: Node, *, abandoned: bool = False) -> DeadlineError:
        """Return the error of a resource whose time is up, with where it stands."""
        cut_short = node.phase != "terminate" and node.armed_for < self.timeout(node)
        blocked = node.blocked - node.blocked_before
        return DeadlineError(
            resource=node.resource.name,
            location=node.declaration.location,
            phase=node.phase,
            seconds=node.armed_for,
            grace=self.grace if self.stopping and cut_short else None,
            stack=self._if_known(NOWHERE, _stands_at, node),
            holders=node.live.holders() if node.live is not None else (),
            opening=self._if_known("", self._reached_by, node),
            blocked=blocked if blocked >= BLOCKED else 0.0,
            abandoned=abandoned,
        )

    def _if_known(self, default: T, look: Callable[[Node], T], node: Node) -> T:
        # It looks at frames and at what stands in them, which may be broken in any way.
        try:
            return look(node)
        except Exception:
            return default
        except BaseException as error:
            self.interrupt(error)
            return default

    def _reached_by(self, node: Node) -> str:
        if node.live is None or node.phase not in ("open", "check"):
            return ""
        if node.live.driver is not None:
            return node.live.describe()
        needs = [self.values.get(need) for need in node.declaration.needs]
        return reached_in(suspended_frames(node.coroutine), needs)

    # -- time -----------------------------------------------------------------------------------

    def _start_seconds(self, node: Node) -> float:
        declared = node.declaration.options.start_timeout
        return self.start_timeout if declared is None else declared

    def close_seconds(self, node: Node) -> float:
        """Return the seconds that its closing has, were it to begin now."""
        seconds = self.timeout(node)
        if self.stopping:
            lost = self.time.lost - self._lost_before_stop
            seconds = min(seconds, max(0.0, self.stop_began + self.grace + lost - self.now()))
        return seconds

    def timeout(self, node: Node) -> float:
        """Return the seconds that its closing has by itself."""
        declared = node.declaration.options.close_timeout
        return self.close_timeout if declared is None else declared

    def report(self, node: Node, happened: Callable[[Node, Any], None], what: object) -> None:
        """Have *happened* told to the owner, at its next turn."""
        self._reports.append((node, happened, what))
        self._bell.set()


def _stands_at(node: Node) -> tuple[str, ...]:
    return waiting_at(node.coroutine)


def _between(began: float | None, ended: float | None) -> float:
    return 0.0 if began is None or ended is None else ended - began
