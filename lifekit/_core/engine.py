"""The engine: what opens, rolls back, closes and keeps deadlines is decided in this file.

Each resource has one task, in `life.py`, which opens it, parks, and closes it. One more task, the
owner, decides: it starts a resource's task when all its parents are open, asks it to close when all
its children have ended, cuts it off at its deadline, and leaves it behind when it ignores even that.
The task of a resource only reports; every change of state is made in the owner's `_turn`, which has
no await. What changes while the run goes on is decided elsewhere: in `absences.py`, `renewals.py` and
`pauses.py`, which are parts of the owner.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from math import inf
from typing import TYPE_CHECKING, Any, cast

import anyio
from anyio import CancelScope, get_cancelled_exc_class

from lifekit import events
from lifekit._util.interrupts import hold, let_go
from lifekit._util.loops import conceal, shelter, spawn

from .abandoned import Abandoned
from .absences import Absences
from .block import Block, current_block
from .deadlines import Deadlines
from .errors import Failure, LifekitError, Phase, is_a
from .life import LAST_CALL, Life
from .node import RUNNING, Node, State, Variables, belongs_to
from .nodes import Nodes
from .pauses import Pauses
from .plan import Plan
from .renewals import Renewals
from .resource import Resource
from .stopping import Stopping, of_worker
from .telling import Teller
from .value import Live
from .worker import OnCrash, Worker
from .working import Working

if TYPE_CHECKING:
    from .drivers import Isolation  # which it gives to what opens
    from .lifespan import Lifespan  # whose run it is, and which its events name

OVERDUE = 5.0
"""Seconds after the grace of a shutdown from which on a signal's handler may interrupt what closes."""


class Engine(Nodes):
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
        gateway: Isolation | None,
        block: Callable[[], Block | None],
        absent: Collection[Resource[Any]],
        workers: Callable[[], bool],
        on_crash: OnCrash,
        crashes: list[Failure],
        on_event: Callable[[events.Event], object] | None,
        on_finished: Callable[[], None],
    ) -> None:
        """Prepare a run; *values* may already hold some, which this run uses and leaves alone.

        *variables* are set for all factories; workers begin when all is open, where *workers* says so
        then, or later. What is *absent* in the lifespan around this one is not opened here either.
        """
        super().__init__(plan, values, absent)
        self.name, self.lifespan = name, lifespan
        self._given = variables
        self.gateway, self.block = gateway, block
        self.start_timeout, self.close_timeout, self.grace = start_timeout, close_timeout, grace
        self.ready = anyio.Event()  # all is open, or all has ended again
        # AnyIO looks for its backend whenever one of these is made.
        self.event, self.scope = type(self.ready), type(CancelScope())
        self.finished = self.event()
        self.stopping = False
        self.open_failures: list[Failure] = []
        self.cut_off: list[str] = []
        self.close_failures: list[Failure] = []
        self.interrupts: list[BaseException] = []  # what must be delivered as it is
        self.held_back: list[BaseException] = []  # likewise, once all is closed
        self.began = self.stop_began = self.lost_before_stop = 0.0
        self._on_finished = on_finished
        self.on_crash, self.crashes = on_crash, crashes
        self.due, self._may_work = set(self.crew), workers  # who begins once all they need is open
        self._changes: list[Callable[[], None]] = []  # asked for, and not made yet
        self.pauses, self.absences, self.renewals = Pauses(self), Absences(self), Renewals(self)
        self.stop_asked = False
        self._unopened, self._running = sum(node.worker is None for node in self.own), 0
        self._abandoned = Abandoned(self)
        self._reports: list[tuple[Node, Callable[[Node, Any], None], object]] = []
        self._told_of = 0
        self._bell = self.event()
        self.time = Deadlines(self._ring, self._blocked)
        self.now = self.time.now
        self._teller = Teller(name, lifespan, on_event, self.time, self.interrupt)
        self._teller.heard &= bool(self.own) or not plan.resources  # else all is open already
        self.tell = self._teller.tell
        self._leave_shelter: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Spawn the owner."""
        self.task = spawn(self._own(), f"lifekit {self.name}", self._never_ran)

    def stop(self) -> None:
        """Ask for the end; while it still starts, for the rollback."""
        self.stop_asked = True
        self._bell.set()

    def _ring(self) -> None:
        self._bell.set()

    def interrupt(self, error: BaseException) -> None:
        """End the application, and deliver *error* then."""
        self.interrupts.append(error)
        self.lifespan.interrupted(error)

    def lose(self) -> None:
        """Say what can't be closed any more: the loop was closed, and did not ask before."""
        left = self.left()
        if not self.finished.is_set() and left:
            told = f"the event loop was closed under the open lifespan of {self.name}"
            events.logger.error(f"{told}: never closed: {left}")
        self._finish()

    def _finish(self) -> None:
        if not self.finished.is_set():
            try:
                self._on_finished()
            except Exception as error:
                self.close_failures.append((self.name, self.lifespan.location, error))
            self.ready.set()
            self.finished.set()

    def _blocked(self, node: Node, seconds: float) -> None:
        stands = self.stands_at(node) or (node.declaration.location,)
        self.tell(events.Blocked, node.resource.name, node.phase, seconds, stands[0])

    # -- the owner ------------------------------------------------------------------------------

    async def _own(self) -> None:
        try:
            self.base = copy_context()
            for variable, value in self._given:
                self.base.run(variable.set, value)
            self.began = self.now()
            for node in self.absent:
                for child in node.children:
                    self.go_on_without(child)
            for node in self.own:
                if node.pending == 0 and node.worker is None:
                    self.begin(node)
            if not self._unopened:
                self._all_open()
            while not (self.stopping and self._running == 0):
                await self._sleep()
                self._turn()
            if self._teller.heard:
                self.tell(events.Stopped, self.stop_timeline())
        except GeneratorExit:
            self.lose()
            raise
        finally:
            let_go(self)
            self._leave_shelter()
            self.interrupts += self.held_back
            self._finish()
            self.pauses.finish()

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
            with self.scope(deadline=self.time.sleep(), shield=self.stop_asked):
                await self._bell.wait()
        except GeneratorExit:  # the loop was closed under it, and nothing can be awaited any more
            raise
        except BaseException as error:
            self.stop_asked = True
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
        # One after the other: what opens anew is open, or has failed, before anything else rests.
        while self._changes and (self.stop_asked or not self._unopened):
            self._carry_out(self._changes.pop(0))
        for node in overdue:
            self._carry_out(self._overdue, node)
        if self.stop_asked and not self.stopping:
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
            self.stop_asked = True

    def _hold_back(self, error: BaseException) -> bool:
        # Called by a signal handler, amid anything. Where the end is long overdue something blocks the
        # loop, and whoever presses Ctrl-C means that.
        lost = self.time.lost - self.lost_before_stop
        if self.now() > self.stop_began + self.grace + lost + OVERDUE:
            return False
        self.held_back.append(error)
        return True

    def _tell_of_held_back(self) -> None:
        self._told_of = len(self.held_back)
        with suppress(Exception):
            events.logger.warning(
                f"{type(self.held_back[-1]).__name__} waits until {self.name} is closed, which takes "
                f"{self.grace:.3g} s at most: {self.left()} left"
            )

    def begin(self, node: Node) -> None:
        """Let its task open it."""
        node.state = State.OPENING
        node.open_began = self.now()
        self._running += 1
        if self._teller.heard:
            self.tell(events.Opening, node.resource.name)
        self.time.arm(node, self.start_seconds(node))
        node.scope, node.closing_scope = self.scope(shield=True), self.scope()
        name = f"lifekit {self.name}.{node.resource.name}"
        life, context = Life(self, node).run(), self._context_for(node)
        node.task = spawn(life, name, lambda: self._never_began(node), context)

    def _context_for(self, node: Node) -> Context:
        # A copy for each: a generator may reset at its end what it set at its beginning.
        for parent in node.parents:
            node.inherited |= parent.inherited | dict(parent.variables)
        if not node.inherited:
            node.context = self.base
        else:
            node.context = self.base.copy()
            for variable, value in node.inherited.items():
                node.context.run(variable.set, value)
        context = node.context.copy()
        context.run(belongs_to.set, node)
        return context

    def has_opened(self, node: Node, live: Live) -> None:
        """Show its value, and begin what waited for it."""
        node.state = State.OPEN
        node.alarm = inf
        if node.rests or (node.away and self.absences.refuses(node)):
            self.end([node])
            return
        if not live.closes:  # its task is over
            del node.task, node.coroutine, node.scope, node.closing_scope
        # The one place where a value becomes visible, before anything that needs it begins.
        node.values[node.resource] = live.value
        if self._teller.heard:
            seconds = _between(node.open_began, node.opened_at)
            self.tell(events.Opened, node.resource.name, seconds, live.describe())
        for child in node.children:
            child.pending -= 1
            if child.pending == 0 and child.state is State.WAITING and not self.stop_asked:
                if child.resource not in child.values:
                    self.begin(child)
                elif child.resource in self.due and self.ready.is_set():
                    self._begin_to_work(child)
        self.renewals.arm(node)
        if node.renewal is not None:
            self.renewals.opened(node.renewal)
        elif node.away:
            self.absences.opened(node)
        else:
            self._unopened -= 1
            self._go_on()

    def go_on_without(self, node: Node) -> None:
        """Wait no more for this one, and for what needs it."""
        left = [node]
        while left:
            each = left.pop()
            if not each.away and each.resource not in each.values:
                each.away = True
                self._unopened -= 1
                left += each.children
        self._go_on()

    def awaits(self, nodes: Sequence[Node]) -> None:
        """Begin once these are open as well: what rested opens again, and workers begin again."""
        for node in nodes:
            if node.worker is not None:
                self.values[node.resource] = node.worker
                self.due.add(node.resource)
            else:
                self._unopened += 1
                if node.pending == 0:
                    self.begin(node)
        self._go_on()

    def _go_on(self) -> None:
        if self._unopened == 0 and not self.stop_asked:
            self._all_open()

    def _all_open(self) -> None:
        begins = not self.ready.is_set()
        if begins and not self._may_work():
            self.due.clear()
        due = self.nodes if self.due else ()
        workers = [node for node in due if node.resource in self.due and node.pending == 0]
        if begins:
            self.time.clear()
            for node in workers:
                node.open_began = node.opened_at = self.now()
            if self._teller.heard:
                self.tell(events.Started, self.start_timeline())
            self.ready.set()
        for node in workers:
            self._begin_to_work(node)
        self.pauses.all_open()

    # -- workers ----------------------------------------------------------------------------------

    def change(self, change: Callable[[], None]) -> None:
        """Have *change* made at the owner's next turn."""
        if self.finished.is_set():
            change()
            return
        self._changes.append(change)
        self._bell.set()

    def _begin_to_work(self, node: Node) -> None:
        self.due.discard(node.resource)
        node.state, node.phase = State.OPEN, "run"
        node.notice = Stopping(self.lifespan.stopping)
        node.wake = self.event()
        self._running += 1
        if self._teller.heard:
            self.tell(events.WorkerStarted, node.resource.name)
        node.closing_scope = self.scope()
        context = self._context_for(node)
        context.run(of_worker.set, (self.lifespan, node.notice))
        context.run(current_block.set, self.block())  # after which what it started is refused
        name, work = f"lifekit {self.name}.{node.resource.name}", Working(self, node).run()
        node.task = spawn(work, name, lambda: self.report(node, self.ended, None), context)

    def failed(self, node: Node, failure: tuple[BaseException, float | None]) -> None:
        """Tell of a run of a worker that failed, and when it is run again: None is never."""
        if self.stop_asked or node.rests:  # the last one, of which nothing else would tell
            self.close_failed(node, ("run", failure[0]))
        else:
            self.tell(events.WorkerFailed, node.resource.name, *failure)

    def crashed(self, node: Node, error: BaseException | None) -> None:
        """Tell of what died while it was to be open, and do what its declaration says."""
        if self.stop_asked or node.rests:  # it was told to end
            node.crashed = False
            return
        if node.renewal is not None:
            self.renewals.failed(node, self.no_word(node))
            return
        node.crashed = True
        on_crash = self.crash_rule(node)
        self.tell(events.Crashed, node.resource.name, error, on_crash)
        if error is not None and on_crash == "stop":
            self.record(self.crashes, node, error)
        self.lifespan.crashed(node.resource.name, on_crash)

    def open_failed(self, node: Node, error: BaseException | None) -> None:
        """Record why it did not open, None where it was cancelled for another's sake."""
        node.state = State.CLOSING
        name = node.resource.name
        if not self.absences.takes(node, error):
            self.tell(events.OpenFailed, name, _between(node.open_began, node.opened_at), error)
        if node.live is not None and node.live.is_open:
            self.tell(events.Closing, name)
        if node.renewal is not None:
            self.renewals.failed(node, error)
        elif node.away:
            pass  # nobody waits for it
        elif error is None:
            self.cut_off.append(name)
        else:
            self.record(self.open_failures, node, error)
            self.stop_asked = True

    def retrying(self, node: Node, failure: tuple[int, float, Exception]) -> None:
        """Tell that it is tried again."""
        self.tell(events.Retrying, node.resource.name, *failure)

    def _begin_stop(self) -> None:
        self.stopping = True
        self.stop_began = self.now()
        self.lost_before_stop = self.time.lost
        hold(self, self._hold_back)
        self._leave_shelter = shelter()
        self.lifespan.stopping.set()
        if self._teller.heard:
            self.tell(events.Stopping)
        self.renewals.stop()
        self.end(self.own)

    def end(self, nodes: Sequence[Node], held: Collection[Node] = ()) -> None:
        """Close these, each when what ends and needs it is closed; cancel those that still open.

        Those *held* wait for one more thing, which counts their ``pending`` down.
        """
        for node in nodes:
            ends = [each for each in node.children if each.rests or self.stopping]
            node.pending = sum(each.state in RUNNING for each in ends) + (node in held)
        for node in reversed(nodes):
            if node.state is State.OPENING and node.cut is None:
                self.time.arm(node, self.close_seconds(node))
                node.scope.cancel()
            elif node.pending == 0:
                self.close_if_open(node)

    def close_if_open(self, node: Node) -> None:
        """Close it, unless that has begun."""
        if node.state is State.OPEN:
            self._ask_to_close(node)

    def _ask_to_close(self, node: Node) -> None:
        node.state = State.CLOSING
        node.close_began = self.now()
        if node.worker is not None:
            self._ask_to_end(node)
            return
        node.values.pop(node.resource, None)
        if self._teller.heard:
            self.tell(events.Closing, node.resource.name)
        self.time.arm(node, self.close_seconds(node))
        node.asked = True
        if node.live is not None and node.live.closes:
            node.wake.set()
        else:
            self.report(node, self.ended, None)

    def _ask_to_end(self, node: Node) -> None:
        # A worker: first it may end by itself, then it is cancelled, then it is left behind.
        assert isinstance(node.declaration, Worker)
        node.asked, node.phase = True, "close"
        if node.worker is not None:
            node.worker.state = "stopping"
        node.notice.set()
        node.wake.set()
        conceal(node.task)
        node.drains = node.declaration.rules.drain > 0
        if node.drains:
            left = self.close_seconds(node, inf) / 2  # the other half is for what is behind it
            self.time.arm(node, min(node.declaration.rules.drain, left))
        else:
            self._cancel(node)

    def _cancel(self, node: Node) -> None:
        node.drains = False
        self.time.arm(node, self.close_seconds(node))
        node.closing_scope.cancel()

    def close_failed(self, node: Node, failure: tuple[Phase, BaseException]) -> None:
        """Record which phase of its closing failed, and how."""
        phase, error = failure
        node.clean = False
        # What a task group of a generator died of comes out where that is left.
        cause = node.crashed and self.on_crash == "stop"
        if node.renewal is not None:
            self.record(node.renewal.close_failures, node, error)
        elif cause or self.stopping or not (node.away or node is not self.nodes[node.index]):
            self.record(self.crashes if cause else self.close_failures, node, error)
        self.tell(events.CloseFailed, node.resource.name, phase, error)

    def died(self, node: Node, error: BaseException) -> None:
        """Record what ended its task from outside of both."""
        if node.state is State.OPENING:
            self.open_failed(node, error)
        elif node.worker is None or self.stop_asked or node.rests:
            self.close_failed(node, (node.phase, error))
        elif not node.crashed:
            node.worker.state, node.worker.last_error = "crashed", error
            self.crashed(node, error)

    def terminated(self, node: Node, _: None) -> None:
        """Tell that it is cut off."""
        self.tell(events.Terminated, node.resource.name)

    def ended(self, node: Node, _: None) -> None:
        """Close what waited for its end."""
        node.state = State.ENDED
        node.alarm = inf
        node.closed_at = self.now()
        self._running -= 1
        if self._teller.heard and node.live is not None and node.live.is_open:
            seconds = _between(node.close_began, node.closed_at)
            self.tell(events.Closed, node.resource.name, seconds, node.clean)
        if node.worker is not None:
            node.notice.forget()
            if node.worker.state != "crashed":
                node.worker.state = "ended"
            if self._teller.heard:
                self.tell(events.WorkerEnded, node.resource.name, node.worker.state)
        elif node.crashed and self.on_crash == "stop" and node.clean:
            self.record(self.crashes, node, self.no_word(node))
        if not node.left:  # else its task may still need it
            node.live = None
        for parent in reversed(node.parents):
            parent.children.pop(node, None)
            if self.stopping or parent.rests:  # else the count is made when it is to close
                parent.pending -= 1
                if parent.pending == 0:
                    self.close_if_open(parent)
        self.pauses.ended()
        if not self.stop_asked:
            self._ended_amid(node)

    def _ended_amid(self, node: Node) -> None:
        now = self.nodes[node.index]
        if now is not node:  # it was renewed, or was to be
            self.own.remove(node)
            self.renewals.ended(node)
            if now.worker is not None and not now.rests:
                self.awaits([now])
        elif node.away:
            self.absences.ended(node)

    def _overdue(self, node: Node) -> None:
        ends = self.stopping or node.rests
        told_to_end = node.cut is not None or (node.state is State.OPENING and ends)
        if node.state is State.WAITING:
            self.absences.due(node)
        elif node.state is State.OPEN:
            self.renewals.due(node)
        elif node.drains:
            self._cancel(node)
        elif told_to_end or node.left or node.worker is not None:
            self._abandoned.leave(node)
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

    def record(self, failures: list[Failure], node: Node, error: BaseException) -> None:
        """Add what *node* failed with to *failures*, unless it must be delivered as it is."""
        if is_a(error, Exception):
            failures.append((node.resource.name, node.declaration.location, cast("Exception", error)))
        else:
            self.interrupts.append(error)

    def report(self, node: Node, happened: Callable[[Node, Any], None], what: object) -> None:
        """Have *happened* told to the owner, at its next turn."""
        self._reports.append((node, happened, what))
        self._bell.set()


def _between(began: float | None, ended: float | None) -> float:
    return 0.0 if began is None or ended is None else ended - began
