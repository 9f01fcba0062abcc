"""What is not required and not open: the start goes on without it, and it is tried again.

What needs it is not required either, and waits for it. Workers that need it begin when it is there.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cache
from types import new_class
from typing import TYPE_CHECKING, Any

from lifekit import events

from .errors import LifekitError, UnavailableError, is_a, summary
from .node import Node, State
from .resource import Resource
from .worker import backoff

if TYPE_CHECKING:
    from .engine import Engine  # which it is a part of


@dataclass(slots=True)
class Absence:
    """Why a resource is not there, how often it has failed, and when it is tried again."""

    error: Exception
    failures: int
    until: float


class Absences:
    """What is not there in one run, and is not required."""

    def __init__(self, owner: Engine) -> None:
        self._owner = owner
        self._known: dict[Resource[Any], Absence] = {}

    def takes(self, node: Node, error: BaseException | None) -> bool:
        """Return whether the run goes on without *node*, which did not open, and note it then."""
        optional = not node.resource.options.required and node.renewal is None
        if not optional or self._owner.stop_asked or error is None or not is_a(error, Exception):
            return False
        assert isinstance(error, Exception)
        before = self._known.get(node.resource)
        failures = before.failures + 1 if before is not None else 1
        delay = backoff(failures)
        self._known[node.resource] = Absence(error, failures, self._owner.now() + delay)
        self._owner.tell(events.Unavailable, node.resource.name, error, delay)
        self._owner.go_on_without(node)
        return True

    def refuses(self, node: Node) -> bool:
        """Return whether *node*, which has just opened, comes at the wrong time."""
        if not (busy := self._owner.lifespan.busy()):
            return False
        node.rests = True
        error = LifekitError(f"it opened while {busy} was in use: it is tried again after that")
        return self.takes(node, error)

    def opened(self, node: Node) -> None:
        """Forget its failures, for it is there; what waited for it opens now, and is not there yet."""
        node.away = False
        known = self._known.pop(node.resource, None)
        if known is not None:
            waits = Absence(known.error, 0, self._owner.now())
            for child in node.children:
                if child.away:
                    self._known.setdefault(child.resource, waits)
        self._owner.lifespan.changed([node.resource])

    def ended(self, node: Node) -> None:
        """Plan the next attempt, as one that failed is over."""
        new = self._owner.anew(node)
        new.away = True
        self._owner.replace(node, new)
        self._owner.stand([new], self._owner.values)
        known = self._known.get(node.resource)
        new.last_error = known.error if known is not None else None
        self._owner.time.arm_at(new, known.until if known is not None else self._owner.now())

    def due(self, node: Node) -> None:
        """Make the next attempt, unless a test would not expect it now."""
        if self._owner.stop_asked or any(each.resource not in node.values for each in node.parents):
            return
        if self._owner.lifespan.busy():
            known = self._known.get(node.resource)
            self._owner.time.arm(node, backoff(known.failures if known is not None else 1))
        else:
            self._owner.begin(node)

    def why(self, resource: Resource[Any]) -> UnavailableError | None:
        """Return the error for who asks for *resource*, None where it is not what is absent."""
        found = next((node for node in self._owner.nodes if node.resource is resource), None)
        while found is not None and found.away and found.state is not State.ENDED:
            if (known := self._known.get(found.resource)) is not None:
                seconds = max(0.0, known.until - self._owner.now())
                return _unavailable(resource, found.resource, known.error, seconds)
            found = next((each for each in found.parents if each.away), None)
        return None


def _unavailable(
    resource: Resource[Any], failed: Resource[Any], error: Exception, seconds: float
) -> UnavailableError:
    needs = "it" if failed is resource else f"{failed.name} ({failed.location}), which it needs,"
    again = f"tried again in {seconds:.3g} s" if seconds else "being tried again just now"
    made = _kind()(
        f"{resource.name} ({resource.location}) is unavailable: {needs} did not open, and is {again}. "
        "It is declared with required=False: catch this error where the application can do without it. "
        f"The last attempt failed with {summary(error)}",
        resource=resource.name,
        error=error,
        retry_after=seconds,
    )
    if type(made) is not UnavailableError:
        answer: Any = made
        answer.status_code, answer.detail = 503, f"{resource.name} is unavailable"
        answer.headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
    return made


def _kind() -> type[UnavailableError]:
    starlette = sys.modules.get("starlette.exceptions")
    return UnavailableError if starlette is None else _answered(starlette.HTTPException)


@cache
def _answered(http_exception: Any) -> type[UnavailableError]:
    # Starlette looks for a handler by the classes of an error, in their order: one that the application
    # has for this error comes first, then that for its own, which answers with the error's status.
    body = {"__module__": "lifekit", "__doc__": UnavailableError.__doc__}
    shown = {"__str__": Exception.__str__, "__repr__": Exception.__repr__}
    bases = (UnavailableError, http_exception)
    return new_class("UnavailableError", bases, exec_body=lambda own: own.update(body | shown))
