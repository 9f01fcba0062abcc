"""What rests for a time in one run that goes on: it is ended, and later it is opened or begun anew."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from .node import RUNNING, Node, State
from .resource import Resource

if TYPE_CHECKING:
    from .engine import Engine  # which it is a part of


class Pauses:
    """What rests in one run."""

    def __init__(self, owner: Engine) -> None:
        self._owner = owner
        self._ending: list[tuple[list[Node], anyio.Event]] = []
        self._resumed: list[anyio.Event] = []

    def begin(self, resources: Collection[Resource[Any]]) -> anyio.Event:
        """End these, which nothing else that is open needs, and set what is returned then."""
        rested = self._owner.event()
        self._owner.change(partial(self._begin, resources, rested))
        return rested

    def end(self, resources: Collection[Resource[Any]]) -> anyio.Event:
        """Open or begin these anew, and set what is returned when that is done, or the run is over."""
        resumed = self._owner.event()
        self._owner.change(partial(self._end, resources, resumed))
        return resumed

    def _begin(self, resources: Collection[Resource[Any]], rested: anyio.Event) -> None:
        owner = self._owner
        nodes = [node for node in owner.own if node.resource in resources and node.state in RUNNING]
        # Of what was renewed workers still end, and new ones would begin; requests hold the rest.
        nodes = [each for each in nodes if each.worker is not None or each is owner.nodes[each.index]]
        self._ending.append((nodes, rested))
        owner.due -= {*resources}
        for node in owner.nodes:
            node.rests |= node.resource in resources  # what has ended by itself as well
        owner.end(nodes)
        self.ended()

    def ended(self) -> None:
        """Tell of what has come to rest."""
        for nodes, rested in self._ending:
            if not any(node.state in RUNNING for node in nodes):
                rested.set()
        self._ending = [each for each in self._ending if not each[1].is_set()]

    def _end(self, resources: Collection[Resource[Any]], resumed: anyio.Event) -> None:
        owner = self._owner
        if owner.stop_asked or owner.finished.is_set():
            resumed.set()
            return
        self._resumed.append(resumed)
        old = [
            node
            for node in owner.nodes
            if node.resource in resources and node.state in (State.ENDED, State.WAITING)
        ]
        new = [owner.anew(node) for node in old]
        for before, after in zip(old, new, strict=True):
            owner.replace(before, after)
        owner.stand(new, owner.values)
        owner.awaits(new)

    def all_open(self) -> None:
        """Tell that what rested is open again."""
        while self._resumed:
            self._resumed.pop().set()

    finish = all_open  # or never is
