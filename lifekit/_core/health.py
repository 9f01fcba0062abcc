"""How a lifespan is now: each resource checked again, each worker asked, and whether it serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import anyio
from anyio import create_task_group, get_cancelled_exc_class, move_on_after

from lifekit._util.loops import clock, spawn

from .errors import is_a, summary
from .node import Node, State
from .stand_in import redact_error
from .worker import WorkerState, WorkerStatus

if TYPE_CHECKING:
    from .engine import Engine  # which it only reads
    from .lifespan import Lifespan  # which is asked for it
    from .value import Live  # which it checks

CHECK_SECONDS = 5.0
"""Seconds that one check has."""
KEPT_SECONDS = 1.0
"""For how long an answer is given again."""

HealthState = Literal["ok", "failing", "starting", "stopping", "unavailable", "crashed"]
"""How a resource or a worker is."""


@dataclass(frozen=True, slots=True)
class ResourceHealth:
    """How one resource or worker is."""

    state: HealthState
    """``failing`` is a resource whose check fails, or a worker that is run again after a failure."""
    seconds: float = 0.0
    """How long its check took."""
    message: str = ""
    """What failed, with no password in it."""


@dataclass(frozen=True, slots=True)
class Health:
    """How a lifespan is."""

    ready: bool
    """Whether it serves: it is open, does not stop, no check fails, and no worker has crashed."""
    live: bool
    """Whether it runs."""
    resources: Mapping[str, ResourceHealth]
    """Its resources and workers, by name."""


class Checks:
    """The checks of one lifespan; callers that come at once share them."""

    def __init__(self, lifespan: Lifespan) -> None:
        self._lifespan = lifespan
        self._last: tuple[float, dict[str, ResourceHealth]] | None = None
        self._under_way: anyio.Event | None = None
        self._given_up: dict[Node, _Check] = {}  # for which the last ones to ask did not wait

    async def health(self) -> Health:
        """Return how the lifespan is."""
        while True:
            if self._last is not None and clock()() - self._last[0] < KEPT_SECONDS:
                return self.known()
            if self._under_way is None:
                await self._check_all()
                return self.known()
            # should whoever checks be cancelled, the next one does
            await self._under_way.wait()

    def known(self) -> Health:
        """Return how it is as far as that is known, without a new check."""
        lifespan = self._lifespan
        engine = lifespan._engine  # pyright: ignore[reportPrivateUsage]
        is_open = engine is not None and engine.ready.is_set() and not engine.stopping
        found = dict(self._last[1]) if self._last is not None else {}
        for name, node in _nodes(lifespan._layers()).items():  # pyright: ignore[reportPrivateUsage]
            if (state := _without_check(node)) is not None:
                found[name] = state
        optional = self._optional()
        checked = not any(
            each.state == "failing" and name not in optional for name, each in found.items()
        )
        ready = is_open and checked and not (lifespan.stopping.is_set() or lifespan.has_crashed)
        return Health(ready, engine is not None and not engine.finished.is_set(), found)

    def _optional(self) -> set[str]:
        # Workers as well: one that is run again after a failure is at work.
        return {
            node.resource.name
            for layer in self._lifespan._layers()  # pyright: ignore[reportPrivateUsage]
            for node in layer.nodes
            if node.worker is not None or not node.resource.options.required
        }

    async def _check_all(self) -> None:
        self._under_way = anyio.Event()
        found: dict[str, ResourceHealth] = {}
        try:
            async with create_task_group() as tasks:
                for name, node in _nodes(self._lifespan._layers()).items():  # pyright: ignore[reportPrivateUsage]
                    found[name] = _without_check(node) or ResourceHealth("ok")
                    if found[name].state == "ok" and node is not None and node.worker is None:
                        tasks.start_soon(self._check, name, node, found)
            self._last = clock()(), found
        finally:
            self._under_way.set()
            self._under_way = None

    async def _check(self, name: str, node: Node, found: dict[str, ResourceHealth]) -> None:
        if (live := node.live) is None or not live.checks:
            return
        now = clock()
        began, check = now(), None
        with move_on_after(CHECK_SECONDS):
            if (before := self._given_up.get(node)) is not None:
                await before.ended.wait()  # so that those that hang do not pile up
            check = _Check(live)
            try:
                await check.ended.wait()
            finally:
                if not check.ended.is_set():
                    self._give_up(node, check)
        if check is None or not check.ended.is_set():
            message = f"its check took longer than {CHECK_SECONDS:.3g} s"
        else:
            message = self._message(check)
        found[name] = ResourceHealth("failing" if message else "ok", now() - began, message)

    def _give_up(self, node: Node, check: _Check) -> None:
        check.scope.cancel()
        self._given_up[node] = check
        check.at_end = lambda: self._given_up.pop(node, None)

    def _message(self, check: _Check) -> str:
        if check.error is None:
            return ""
        if is_a(check.error, get_cancelled_exc_class()):
            return "its check was cancelled, not by lifekit"
        if not is_a(check.error, Exception) and self._lifespan._engine is not None:  # pyright: ignore[reportPrivateUsage]
            self._lifespan._engine.interrupt(check.error)  # pyright: ignore[reportPrivateUsage]
        return summary(check.error)


class _Check:
    """One check, in a task of its own: where it waits for a thread it can't be cancelled, only left."""

    def __init__(self, live: Live) -> None:
        self.ended, self.scope = anyio.Event(), anyio.CancelScope()
        self.error: BaseException | None = None
        self.at_end: Callable[[], object] = lambda: None
        self.task: object = spawn(self._run(live), "lifekit check", self.ended.set)

    async def _run(self, live: Live) -> None:
        try:
            with self.scope:
                await live.check()
        except GeneratorExit:
            raise
        except BaseException as error:
            self.error = redact_error(error, live.value)
        finally:
            self.ended.set()
            self.at_end()


def _nodes(layers: list[Engine]) -> dict[str, Node | None]:
    """Return the nodes by name, of an override the new ones; None is a value that somebody gave."""
    found: dict[str, Node | None] = {}
    for layer in layers:
        for node in layer.nodes:
            name, outer = node.resource.name, found.get(node.resource.name)
            if node in layer.own:
                found[name] = node
            elif outer is None or layer is layers[0]:
                found[name] = None
            elif outer.live is None or layer.values.get(node.resource) is not outer.live.value:
                found[name] = outer if outer.worker is not None else None
    return found


def _without_check(node: Node | None) -> ResourceHealth | None:
    """Return how it is, None where only a check can tell."""
    if node is None:
        return ResourceHealth("ok")
    absent = next((each for each in (node, *node.parents) if each.away), None)
    if absent is not None and node.state in (State.WAITING, State.OPENING):
        error = absent.last_error
        return ResourceHealth("unavailable", message=summary(error) if error is not None else "")
    if node.worker is not None:
        return _of_worker(node.worker)
    if node.crashed:
        return ResourceHealth("crashed", message="a task group or a scope of its own was cancelled")
    if node.state in (State.WAITING, State.OPENING):
        return ResourceHealth("starting")
    return None if node.state is State.OPEN else ResourceHealth("stopping")


_OF_WORKERS: dict[WorkerState, HealthState] = {
    "starting": "starting",
    "restarting": "failing",
    "stopping": "stopping",
    "crashed": "crashed",
}


def _of_worker(status: WorkerStatus) -> ResourceHealth:
    state = _OF_WORKERS.get(status.state, "ok")
    error = status.last_error if state in ("failing", "crashed") else None
    return ResourceHealth(state, message=summary(error) if error is not None else "")
