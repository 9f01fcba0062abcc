"""Requests under way, by the generation of values that they began with.

A generation ends with a renewal. What was renewed then is held by the requests that began before: also
by those of earlier generations, for they may have asked for it since.
"""

from __future__ import annotations

from collections.abc import Callable

from lifekit._util.asgi import Scope


class Generation:
    """The requests that began between two renewals, of those that are under way."""

    def __init__(self, before: Generation | None = None) -> None:
        self._requests: dict[int, Scope] = {}
        self._before = before
        self.released: Callable[[], object] | None = None
        """Once it is over: called when its last request ends."""

    def begin(self, request: Scope) -> None:
        """Count a request."""
        self._requests[id(request)] = request

    def end(self, request: Scope) -> None:
        """Count it no more."""
        self._requests.pop(id(request), None)
        if self.released is not None and not self._requests:
            self.released()

    @property
    def is_held(self) -> bool:
        """Whether a request is under way that began in it, or earlier."""
        if self._before is not None and not self._before.is_held:
            self._before = None
        return bool(self._requests) or self._before is not None

    def next(self, released: Callable[[], object]) -> Generation:
        """Return the one that begins now; call *released* as the requests of this one end."""
        self.released = released
        return Generation(self if self.is_held else None)

    def holders(self) -> tuple[str, ...]:
        """Return the requests under way, each by its method and path."""
        before = self._before.holders() if self._before is not None else ()
        here = [
            f"{each.get('method', each['type'])} {each['path']}" for each in self._requests.values()
        ]
        return (*before, *here)
