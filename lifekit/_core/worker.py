"""A worker: its handle, what its declaration says, how it stands, and what follows the end of a run.

All of it is pure; the task in which a worker runs is in `working.py`.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from .resource import Resource

Restart = Literal["on-failure", "always", "never"]
"""After which end of a run a worker is run again."""
OnCrash = Literal["stop", "unready", "ignore"]
"""What a crash does: stop the application, only take it out of service, or neither."""
WorkerState = Literal[
    "starting", "standby", "running", "waiting", "restarting", "stopping", "ended", "crashed"
]
"""How a worker stands.

``standby`` is while another process leads, ``waiting`` between two runs, ``restarting`` the same after
one that failed.
"""

FIRST_DELAY, LONGEST_DELAY = 0.1, 30.0
"""Seconds before a worker is run again, or an opening tried again: at first, and at most."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a declaration says of when its worker runs, and what happens when it fails."""

    every: float | None = None
    restart: Restart = "on-failure"
    limit: tuple[int, float] = (5, 60.0)
    on_crash: OnCrash = "stop"
    drain: float = 0.0
    leader: Resource[Any] | None = None


@dataclass(slots=True, eq=False)
class WorkerStatus:
    """How a worker stands in one lifespan: what ``lifespan[worker]`` is."""

    name: str
    """The worker's name."""
    state: WorkerState = "starting"
    """Where it is in its life."""
    restarts: int = 0
    """How often it was run again, beside the runs of ``every=``."""
    last_error: BaseException | None = field(default=None, repr=False)  # its text may hold a password
    """What its last failure was, with no password in it; None if it never failed."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Worker(Resource[WorkerStatus]):
    """A declared worker: a handle by which a lifespan tells how it stands."""

    rules: Rules = Rules()

    def __repr__(self) -> str:
        return f"<Worker {self.name!r} of {self.registry.name!r}, {self.location}>"


def backoff(failures: int) -> float:
    """Return the seconds until the next attempt after so many failures in a row.

    Twice as long each time; anywhere in the upper half of that.
    """
    delay: float = min(FIRST_DELAY * 2 ** min(failures - 1, 20), LONGEST_DELAY)
    return delay * random.uniform(0.5, 1.0)


class Supervision:
    """What follows each end of a worker's runs, by its rules and by what happened before."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._failures: deque[float] = deque(maxlen=rules.limit[0] + 1)
        self._in_a_row = 0

    def returned(self, ran_for: float) -> float | None:
        """Return the seconds until the next run, None if there is none."""
        if self._rules.every is not None:
            self._in_a_row = 0
            return self._rules.every
        return self._delay(ran_for) if self._rules.restart == "always" else None

    def failed(self, ran_for: float, now: float) -> float | None:
        """Return the seconds until the next run, None if the worker has crashed."""
        self._failures.append(now)
        count, seconds = self._rules.limit
        too_many = len(self._failures) > count and now - self._failures[0] <= seconds
        if too_many or self._rules.restart == "never":
            return None
        return max(self._delay(ran_for), self._rules.every or 0.0)

    def _delay(self, ran_for: float) -> float:
        self._in_a_row = 0 if ran_for > self._rules.limit[1] else self._in_a_row
        self._in_a_row += 1
        return backoff(self._in_a_row)
