"""One resource in one run: its state, its time, and the scopes of its task.

A resource goes WAITING, OPENING, OPEN, CLOSING, ENDED. One that fails goes from OPENING straight to
CLOSING, and what never begins stays WAITING.
"""

from __future__ import annotations

from enum import Enum, auto
from math import inf
from typing import Any

import anyio
from anyio import CancelScope

from ._closing import Live
from ._errors import DeadlineError, Phase
from ._resource import Resource


class State(Enum):
    """Where a resource is in its life."""

    WAITING = auto()
    OPENING = auto()
    OPEN = auto()
    CLOSING = auto()
    ENDED = auto()


RUNNING = {State.OPENING, State.OPEN, State.CLOSING}


class Node:
    """One resource in one run."""

    __slots__ = (
        "alarm",
        "armed_for",
        "asked",
        "clean",
        "close_began",
        "closed_at",
        "closing_scope",
        "coroutine",
        "cut",
        "declaration",
        "index",
        "last_error",
        "left",
        "live",
        "open_began",
        "opened_at",
        "pending",
        "phase",
        "resource",
        "scope",
        "state",
        "task",
        "wake",
    )

    coroutine: Any
    scope: CancelScope
    closing_scope: CancelScope
    task: object
    wake: anyio.Event

    def __init__(
        self, resource: Resource[Any], declaration: Resource[Any], index: int, pending: int
    ) -> None:
        self.resource = resource
        self.declaration = declaration  # its own, or the one that overrides it
        self.index = index
        self.pending = pending  # parents not yet open; once stopping, children not yet ended
        self.state = State.WAITING
        self.phase: Phase = "open"
        self.live: Live | None = None
        self.last_error: BaseException | None = None  # of the attempt before
        self.cut: DeadlineError | None = None  # why lifekit cancelled it, until its task takes it
        self.alarm = inf  # when the time of its phase is up
        self.armed_for = inf  # the seconds that it had
        self.asked = False
        self.clean = True
        self.left = False  # behind, by the owner
        self.open_began: float | None = None
        self.opened_at: float | None = None  # or when the opening failed
        self.close_began: float | None = None
        self.closed_at: float | None = None
