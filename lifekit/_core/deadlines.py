"""The deadlines of one run: when whose time is up.

A deadline counts the time in which a resource could have run. For as long as something blocks the
event loop nothing else can, so that this time is charged to whatever blocked it, and to nobody else.
Of what blocks in a resource's own task each step is measured. Of all else it is only seen that the
owner, who sleeps until the next deadline or a part of the way to it, wakes too late.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import count
from math import inf

from lifekit._util.loops import clock

from .node import Node

BLOCKED = 0.05
"""Seconds from which on a step counts as one that blocked the event loop."""
WORTH_SAYING = 1.0
"""Seconds of it that are told of, also where they break no deadline."""
LOOKS = 8
"""The owner looks whether it can run after this part of the time that is left."""


class Deadlines:
    """The alarms of the resources of one run, in its event loop.

    *ring* wakes the owner; *blocked* hears of a resource that blocked for a time worth saying.
    """

    def __init__(self, ring: Callable[[], None], blocked: Callable[[Node, float], None]) -> None:
        self.now = clock()
        self.lost = 0.0
        """Seconds for which something blocked the event loop, whoever it was."""
        self._ring, self._blocked = ring, blocked
        self._alarms: list[tuple[float, int, int, Node]] = []  # in declaration order, then as they came
        self._count = count()
        self._next_alarm = -inf
        self._wakes_at = inf  # the owner, at the latest
        self._step_began = 0.0  # that of the resource whose task runs now

    def arm(self, node: Node, seconds: float) -> None:
        """Give a resource *seconds* for what it does next."""
        node.armed_for = seconds
        node.blocked_before = node.blocked
        self.arm_at(node, self.now() + seconds)

    def arm_at(self, node: Node, when: float) -> None:
        """Let a resource's time be up at *when*."""
        if node.left:
            return
        node.alarm = when
        node.lost = self.lost - node.blocked
        if when < inf:
            heapq.heappush(self._alarms, (when, node.index, next(self._count), node))
            if when < self._next_alarm:
                self._ring()

    def due(self, node: Node) -> float:
        """Return when a resource's time is up, which is later by what others took from it."""
        lost = self.lost - node.blocked
        if lost > node.lost and node.alarm < inf:
            self.arm_at(node, node.alarm + lost - node.lost)
        return node.alarm

    def clear(self) -> None:
        """Forget the alarms that hold no more."""
        self._alarms = [alarm for alarm in self._alarms if alarm[-1].alarm == alarm[0]]
        heapq.heapify(self._alarms)

    # -- the owner's ----------------------------------------------------------------------------

    def sleep(self) -> float:
        """Return until when the owner may sleep."""
        self._next_alarm = self._alarms[0][0] if self._alarms else inf
        self._wakes_at = inf
        if self._alarms:
            now = self.now()
            look = now + max(BLOCKED, (self._next_alarm - now) / LOOKS)
            # An alarm may be set for a time that has passed, which is nobody's delay.
            self._wakes_at = max(now, min(self._next_alarm, look))
        return self._wakes_at

    def awake(self) -> None:
        """Note that the owner is awake, so that nobody needs to wake it."""
        self._note_delay(self.now())
        self._next_alarm, self._wakes_at = -inf, inf

    def overdue(self) -> Iterator[Node]:
        """Return those whose time is up now, unless their alarm changes before they are asked for."""
        now = self.now()
        rung: list[tuple[float, Node]] = []
        while self._alarms and self._alarms[0][0] <= now:
            when, *_, node = heapq.heappop(self._alarms)
            rung.append((when, node))
        return self._still_overdue(rung, now)

    def _still_overdue(self, rung: list[tuple[float, Node]], now: float) -> Iterator[Node]:
        for when, node in rung:
            if node.alarm == when and self.due(node) <= now:
                yield node

    def _note_delay(self, now: float) -> None:
        # The owner was to be awake and could not.
        late = now - self._wakes_at
        if late >= BLOCKED:
            self.lost += late
            self._wakes_at += late

    # -- a resource's own task's ----------------------------------------------------------------

    def begin_step(self) -> None:
        """Note that a step of the task begins, during which nothing else runs."""
        self._step_began = now = self.now()
        self._note_delay(now)

    def charge(self, node: Node) -> float:
        """Let the resource whose task runs answer for the time since its step began; return now."""
        now = self.now()
        seconds, self._step_began = now - self._step_began, now
        if seconds >= BLOCKED:
            node.blocked += seconds
            self.lost += seconds
            self._wakes_at = max(self._wakes_at, now)  # so that it is not counted twice
            if seconds >= WORTH_SAYING:
                self._blocked(node, seconds)
        return now

    def is_late(self, node: Node) -> bool:
        """Return whether the resource whose task runs has used up its time."""
        return self.charge(node) > self.due(node)
