"""Renewals: what is open is built anew beside itself, serves from then on, and the old one closes.

A renewal opens new nodes for a resource and for what is built from it, whose values nobody sees. When
all of them are open, they take the places of the old ones, in one turn. The old ones close when the
requests that began before are over, or when those have had the registry's ``grace``. Where one of the
new does not open, the others are closed again, and the old ones stay.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from lifekit import events
from lifekit._util.loops import sit_out

from .errors import (
    Failure,
    LifekitError,
    NotOpenError,
    OverrideError,
    SandboxUnsupportedError,
    ShutdownError,
    StartupError,
    is_a,
)
from .generations import Generation
from .node import RUNNING, Node, State, belongs_to
from .plan import dependents
from .resource import Resource
from .running import why_not_open

if TYPE_CHECKING:
    from .engine import Engine  # which it is a part of
    from .lifespan import Lifespan  # whose values it renews


class Renewal:
    """One renewal: its new nodes, whose values serve all at once or never."""

    def __init__(self, resource: Resource[Any], done: anyio.Event, *, by_clock: bool = False) -> None:
        self.resource, self.done, self.by_clock = resource, done, by_clock
        self.error: Exception | None = None  # why it came to nothing, once it is done
        self.nodes: list[Node] = []
        self.values: dict[Resource[Any], Any] = {}
        self.unopened = 0
        self.gives_up = False
        self.began = 0.0
        self.failures: list[Failure] = []
        self.cut_off: list[str] = []
        self.close_failures: list[Failure] = []


class Renewals:
    """The renewals of one run, one after the other, and what of old generations is not closed yet."""

    def __init__(self, owner: Engine) -> None:
        self._owner = owner
        self._queue: deque[Renewal] = deque()
        self._held: list[tuple[Generation, list[Node]]] = []

    def ask(self, resource: Resource[Any], *, by_clock: bool = False) -> Renewal:
        """Renew *resource*, and what is built from it, when those before are done."""
        renewal = Renewal(resource, self._owner.event(), by_clock=by_clock)
        self._owner.change(partial(self._add, renewal))
        return renewal

    def wait_for(self, node: Node) -> bool:
        """Return whether one of them is not done before *node* has opened, or closed again."""
        return node.renewal in self._queue

    def arm(self, node: Node) -> None:
        """Let an open resource be renewed when its time has come."""
        every = node.declaration.options.renew_every
        if every is not None and not self._owner.lifespan.sandboxed:  # no test would expect it
            self._owner.time.arm(node, every)

    def due(self, node: Node) -> None:
        """Renew it, or close it though it is held, whichever it waits for."""
        if node.rests:
            self._release(node)
            return
        waits = any(each.resource is node.resource for each in self._queue)
        if self._owner.ready.is_set() and not (waits or self._owner.lifespan.busy()):
            self.ask(node.resource, by_clock=True)
        self.arm(node)

    def _add(self, renewal: Renewal) -> None:
        self._queue.append(renewal)
        if self._owner.stop_asked or self._owner.finished.is_set():
            self.stop()
        elif len(self._queue) == 1:
            self._begin(renewal)

    def stop(self) -> None:
        """Give all of them up: the run ends, which closes what they have opened."""
        self._held.clear()
        for renewal in self._queue:
            name = renewal.resource.name
            renewal.error = LifekitError(f"{self._owner.name} was stopped while {name} was renewed")
            renewal.done.set()
        self._queue.clear()

    def _begin(self, renewal: Renewal) -> None:
        owner = self._owner
        if busy := owner.lifespan.busy():
            self._done(renewal, _busy(renewal.resource, busy))
            return
        wanted = dependents(owner.plan, renewal.resource)
        old = [each for each in owner.nodes if each.resource in wanted and each.state is State.OPEN]
        old = [each for each in old if each.worker is None]
        if all(each.resource is not renewal.resource for each in old):  # an attempt has its own times
            error = owner.absences.why(renewal.resource) or LifekitError(
                f"{renewal.resource.name} is not open, so that it can't be renewed"
            )
            self._done(renewal, error)
            return
        renewal.began = owner.now()
        renewal.nodes = [owner.anew(each) for each in old]
        renewal.unopened = len(old)
        renewed = {each.resource for each in old}
        renewal.values.update(
            (each, owner.values[each]) for each in owner.values if each not in renewed
        )
        owner.stand(renewal.nodes, renewal.values)
        for node in renewal.nodes:
            node.renewal = renewal
        for node in renewal.nodes:
            if node.pending == 0:
                owner.begin(node)

    # -- the new ones serve -----------------------------------------------------------------------

    def opened(self, renewal: Renewal) -> None:
        """Let the new ones serve, when all of them are open."""
        renewal.unopened -= 1
        if renewal.unopened or renewal.gives_up or renewal.done.is_set():
            return
        if busy := self._owner.lifespan.busy():
            renewal.error = _busy(renewal.resource, busy)
            self._give_up(renewal)
        else:
            self._serve(renewal)

    def _serve(self, renewal: Renewal) -> None:
        owner = self._owner
        wanted = dependents(owner.plan, renewal.resource)
        old = [each for each in owner.nodes if each.resource in wanted and each.state in RUNNING]
        before = dict(owner.values)
        for node in old:
            node.rests, node.values = True, before
        new = {node.index: node for node in renewal.nodes}
        for node in renewal.nodes:
            owner.values[node.resource] = renewal.values[node.resource]
            node.values, node.renewal = owner.values, None
        for node in old:
            self._take_the_place_of(node, new.get(node.index))
        owner.lifespan.changed([node.resource for node in renewal.nodes])
        owner.tell(events.Renewed, renewal.resource.name, owner.now() - renewal.began)
        self._close(old)
        self._done(renewal, None)

    def _take_the_place_of(self, old: Node, new: Node | None) -> None:
        owner = self._owner
        if new is not None:
            owner.replace(old, new)
        elif old.worker is not None:  # the next begins when this one has ended
            new = owner.anew(old)
            owner.replace(old, new)
            owner.stand([new], owner.values)
        else:  # one that is not required, and came while the others were renewed: it comes once more
            owner.values.pop(old.resource, None)
            old.away = True
            owner.absences.ended(old)

    def _close(self, old: list[Node]) -> None:
        owner = self._owner
        held_by = owner.lifespan.next_generation(self._look_at_held)
        held = [node for node in old if held_by is not None and node.worker is None]
        owner.end(old, held)
        if held_by is not None:
            self._held.append((held_by, held))
            for node in held:
                owner.time.arm(node, owner.grace)

    def _look_at_held(self) -> None:
        # Called as a request ends, which must not close anything itself.
        self._owner.change(self._let_go_of_free)

    def _let_go_of_free(self) -> None:
        free = [each for each in self._held if not each[0].is_held]
        self._held = [each for each in self._held if each[0].is_held]
        for _, nodes in free:
            self._let_go(nodes)

    def _release(self, node: Node) -> None:
        # Its time is up, and that of all that were renewed with it.
        for held_by, nodes in [each for each in self._held if node in each[1]]:
            self._held.remove((held_by, nodes))
            names = ", ".join(each.resource.name for each in nodes)
            self._owner.tell(events.HeldTooLong, names, self._owner.grace, held_by.holders())
            self._let_go(nodes)

    def _let_go(self, nodes: list[Node]) -> None:
        for node in reversed(nodes):
            node.pending -= 1
            if node.pending == 0:
                self._owner.close_if_open(node)

    # -- they don't open ----------------------------------------------------------------------------

    def failed(self, node: Node, error: BaseException | None) -> None:
        """Give the renewal up that *node* is a part of."""
        renewal = node.renewal
        assert renewal is not None
        if error is None:
            renewal.cut_off.append(node.resource.name)
        elif is_a(error, Exception):
            self._owner.record(renewal.failures, node, error)
        else:
            self._owner.interrupt(error)
        if not (renewal.gives_up or renewal.done.is_set()):
            self._give_up(renewal)

    def _give_up(self, renewal: Renewal) -> None:
        renewal.gives_up = True
        for node in renewal.nodes:
            node.rests = True
        self._owner.end(renewal.nodes)

    def ended(self, node: Node) -> None:
        """Say what a renewal came to, when all that it had opened is closed again."""
        renewal = node.renewal
        if renewal is None or any(each.state in RUNNING for each in renewal.nodes):
            return
        not_begun = [each for each in renewal.nodes if each.state is State.WAITING]
        for each in not_begun:
            self._owner.forget(each)
        if renewal.error is None:
            shutdown = None
            if renewal.close_failures:
                shutdown = ShutdownError.of(self._owner.name, renewal.close_failures)
            renewal.error = StartupError.of(
                self._owner.name,
                renewal.failures,
                renewing=renewal.resource.name,
                opened=[each.resource.name for each in renewal.nodes if each.asked],
                cut_off=renewal.cut_off,
                not_begun=[each.resource.name for each in not_begun],
                rollback=shutdown,
            )
        self._done(renewal, renewal.error)

    def _done(self, renewal: Renewal, error: Exception | None) -> None:
        renewal.error = error
        if error is not None:
            self._owner.tell(events.RenewalFailed, renewal.resource.name, error)
        renewal.done.set()
        was_next = renewal is self._queue[0]
        self._queue.remove(renewal)
        if was_next and self._queue:
            self._begin(self._queue[0])

    def abandon(self, renewal: Renewal) -> None:
        """Give it up, whose caller was cancelled."""
        self._owner.change(partial(self._abandon, renewal))

    def _abandon(self, renewal: Renewal) -> None:
        if renewal.done.is_set() or renewal.gives_up:
            return
        renewal.error = LifekitError("its caller was cancelled")
        if renewal.nodes:
            self._give_up(renewal)
        else:
            self._done(renewal, renewal.error)


async def renew(resource: Resource[Any], lifespan: Lifespan, owner: Engine) -> None:
    """Renew *resource* in a run, as `Lifespan.renew` says."""
    declared = {node.resource for node in owner.own}
    if not owner.ready.is_set() or owner.stopping or not lifespan.declares(resource):
        raise NotOpenError(why_not_open(lifespan, resource), resource=resource.name)
    if resource in owner.crew or resource not in declared:
        kind = "a worker" if resource in owner.crew else "a value that an override gave"
        raise LifekitError(
            f"{resource.name} ({resource.location}) is {kind}, and can't be renewed. Renew what "
            "is built anew from its declaration: a resource."
        )
    builder = belongs_to.get()
    if builder is not None and owner.renewals.wait_for(builder):
        raise LifekitError(
            f"{resource.name} ({resource.location}) can't be renewed by the factory of "
            f"{builder.resource.name} ({builder.resource.location}): a renewal is waiting for that, "
            "and this one would wait for both. Call renew() when it is open, in a worker or a request."
        )
    renewal = owner.renewals.ask(resource)
    try:
        await renewal.done.wait()
    except BaseException:
        owner.renewals.abandon(renewal)
        await sit_out(renewal.done)
        raise
    if renewal.error is not None:
        raise renewal.error


def _busy(resource: Resource[Any], busy: str) -> LifekitError:
    kind = SandboxUnsupportedError if busy.startswith("the sandbox") else OverrideError
    return kind(
        f"{resource.name} ({resource.location}) can't be renewed while {busy} is in use: what is built "
        "inside would outlive it. Renew it before or after."
    )
