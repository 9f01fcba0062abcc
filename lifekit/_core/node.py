"""One resource or worker in one run: its state, its time, and the scopes of its task.

A resource goes WAITING, OPENING, OPEN, CLOSING, ENDED. One that fails goes from OPENING straight to
CLOSING, and what never begins stays WAITING. A worker goes from WAITING straight to OPEN.

A node does that once. What is tried again, or renewed, has another one, which stands on what is open
then.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from contextvars import Context, ContextVar
from enum import Enum, auto
from math import inf
from typing import TYPE_CHECKING, Any

import anyio
from anyio import CancelScope

from .errors import DeadlineError, Phase
from .resource import Resource
from .stopping import Stopping
from .value import Live
from .worker import Worker, WorkerStatus

if TYPE_CHECKING:
    from .renewals import Renewal  # which it may be a part of


class State(Enum):
    """Where a resource is in its life."""

    WAITING = auto()
    OPENING = auto()
    OPEN = auto()
    CLOSING = auto()
    ENDED = auto()


RUNNING = {State.OPENING, State.OPEN, State.CLOSING}

Variables = tuple[tuple[ContextVar[Any], Any], ...]
"""Context variables that were set, with their values."""


def variables_set(base: Context, now: Context) -> Variables:
    """Return what was set in a context that was *base* once, but for lifekit's own."""
    with suppress(Exception):  # of a value that can't be compared
        if now == base:  # at once, where they are the same, as they are almost always
            return ()
    return tuple(
        (variable, value)
        for variable, value in now.items()
        if not variable.name.startswith("lifekit.") and base.get(variable, now) is not value
    )


belongs_to: ContextVar[Node | None] = ContextVar("lifekit.belongs_to", default=None)
"""What a task was started by: it is inherited by all that a factory starts."""


class Node:
    """One resource in one run."""

    __slots__ = (
        "alarm",
        "armed_for",
        "asked",
        "away",
        "blocked",
        "blocked_before",
        "children",
        "clean",
        "close_began",
        "closed_at",
        "closing_scope",
        "context",
        "coroutine",
        "crashed",
        "cut",
        "declaration",
        "drains",
        "index",
        "inherited",
        "last_error",
        "left",
        "live",
        "lost",
        "notice",
        "open_began",
        "opened_at",
        "parents",
        "pending",
        "phase",
        "renewal",
        "resource",
        "rests",
        "scope",
        "state",
        "task",
        "told",
        "values",
        "variables",
        "wake",
        "worker",
    )

    context: Context
    """The one that it began with."""
    scope: CancelScope
    closing_scope: CancelScope
    task: object
    wake: anyio.Event
    notice: Stopping
    """A worker's."""

    values: dict[Resource[Any], Any]
    """Where it finds what it is built from, and where its own value becomes visible."""

    def __init__(self, resource: Resource[Any], declaration: Resource[Any], index: int) -> None:
        self.resource = resource
        self.declaration = declaration  # its own, or the one that overrides it
        self.index = index
        self.parents: tuple[Node, ...] = ()
        self.children: dict[Node, None] = {}  # in order, those that may run
        self.pending = 0  # parents not yet open; once it is to close, children not yet ended
        self.state = State.WAITING
        self.coroutine: Any = None
        self.phase: Phase = "open"
        self.live: Live | None = None
        self.last_error: BaseException | None = None  # of the attempt before
        self.cut: DeadlineError | None = None  # why lifekit cancelled it, until its task takes it
        self.alarm = inf  # when the time of its phase is up
        self.armed_for = inf  # the seconds that it had
        self.blocked = 0.0  # seconds for which it kept the event loop from everybody else
        self.blocked_before = 0.0  # of them those before its alarm was set
        self.lost = 0.0  # seconds for which others did, as far as its alarm allows for them
        self.asked = False
        self.crashed = False  # it died while it was to be open
        self.told = False  # at the end of a block
        self.drains = False  # a worker that may still end by itself
        self.rests = False  # it closes, or has closed, though the run goes on
        self.away = False  # the start went on without it
        self.renewal: Renewal | None = None  # which it is a part of, until its value serves
        self.worker = WorkerStatus(resource.name) if isinstance(resource, Worker) else None
        self.clean = True
        self.left = False  # behind, by the owner
        self.inherited: dict[ContextVar[Any], Any] = {}  # what factories before it set
        self.variables: Variables = ()  # what its own factory did
        self.open_began: float | None = None
        self.opened_at: float | None = None  # or when the opening failed
        self.close_began: float | None = None
        self.closed_at: float | None = None

    def stand_on(self, parents: Iterable[Node], values: dict[Resource[Any], Any]) -> None:
        """Let it be built from *parents*, and its value be one of *values*."""
        self.parents, self.values = tuple(parents), values
        self.pending = self.unopened_parents()
        for parent in self.parents:
            parent.children[self] = None

    def hand_over(self, new: Node) -> None:
        """Let those of its children that stay stand on *new*, which is to close after them."""
        for child in [each for each in self.children if not each.rests]:
            del self.children[child]
            new.children[child] = None
            child.parents = tuple(new if each is self else each for each in child.parents)
            if child.state is State.WAITING:
                child.pending = child.unopened_parents()

    def unopened_parents(self) -> int:
        """Return how many must open before it may."""
        return sum(parent.resource not in self.values for parent in self.parents)
