"""Whatever fails, wherever: what opened is closed exactly once, children first, nothing is hidden.

{open, check, close, wait_closed, terminate} x {fine, raises, hangs, raises BaseException, cancelled
once, cancelled many times, outer scope cancelled} x {first, middle, last, all of a chain}, each time
against the whole event log that a page of model code predicts; and the same of a renewal, and of what
is not required. In virtual time, so that hangs cost nothing and a busy machine changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import anyio
import pytest
from anyio import CancelScope
from anyio.lowlevel import checkpoint

from lifekit import DeadlineError, Registry, ShutdownError, StartupError, events

from . import virtual_time
from .leaks import tasks_alive

NAMES = ("first", "middle", "last")
PHASES = ("open", "check", "close", "wait_closed", "terminate")
MODES = ("fine", "raises", "hangs", "interrupts", "cancelled", "cancelled_often", "scope_cancelled")
PLACES = {"first": NAMES[:1], "middle": NAMES[1:2], "last": NAMES[2:], "all": NAMES}
STARTS = ("open", "check")
CANCELS = ("cancelled", "cancelled_often", "scope_cancelled")


class BoomError(Exception):
    """What a phase raises."""


class Interrupt(BaseException):
    """What a phase raises where a KeyboardInterrupt or SystemExit would stand."""


@dataclass
class World:
    """One case: how the parts behave, what happened to them, and how to cancel the caller."""

    phase: str
    mode: str
    bad: tuple[str, ...]
    calls: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    log: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]])
    cancel: Callable[[], object] = lambda: None
    by_task: bool = False  # whether it is a task that is cancelled, not a scope

    async def act(self, name: str, phase: str) -> None:
        """Do what the part called *name* does in *phase*."""
        self.calls.append((name, phase))
        await checkpoint()
        if name not in self.bad:
            return
        if self.phase == "terminate" and phase == "close":
            raise BoomError(name, phase)  # the way to a terminate
        if phase == self.phase:
            await self.misbehave(name)

    async def misbehave(self, name: str) -> None:
        """Do what the case is about."""
        match self.mode:
            case "raises":
                raise BoomError(name, self.phase)
            case "interrupts":
                raise Interrupt(name, self.phase)
            case "hangs":
                await anyio.sleep_forever()
            case "cancelled" | "cancelled_often" | "scope_cancelled":
                for _ in range(5 if self.mode == "cancelled_often" else 1):
                    self.cancel()
                    if self.phase not in STARTS:
                        await checkpoint()
                        await checkpoint()
                if self.phase in STARTS:
                    await anyio.sleep_forever()  # the rollback ends it
            case _:
                await checkpoint()

    def hear(self, event: events.Event) -> None:
        """Note an event without its times."""
        match event:
            case events.OpenFailed():
                self.log.append(("OpenFailed", event.resource, type(event.error)))
            case events.CloseFailed():
                self.log.append(("CloseFailed", event.resource, event.phase, type(event.error)))
            case events.Closed():
                self.log.append(("Closed", event.resource, event.clean))
            case events.Started() | events.StopNoticed() | events.Stopping() | events.Stopped():
                self.log.append((type(event).__name__,))
            case _:
                self.log.append((type(event).__name__, event.resource))


class Part:
    """A value with every phase."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name

    async def check(self) -> None:
        await self.world.act(self.name, "check")

    async def close(self) -> None:
        await self.world.act(self.name, "close")

    async def wait_closed(self) -> None:
        await self.world.act(self.name, "wait_closed")

    async def terminate(self) -> None:
        await self.world.act(self.name, "terminate")


def chain(world: World, *later: World, required: bool = True) -> Registry:
    """Declare first <- middle <- last; its later attempts, if any, are those of *later*."""
    registry = Registry(on_event=world.hear)
    before: tuple[Any, ...] = ()
    for name in NAMES:
        attempts = iter((world, *later))

        async def make(*_: Part, name: str = name, attempts: Iterator[World] = attempts) -> Part:
            attempt = next(attempts)
            await attempt.act(name, "open")
            return Part(attempt, name)

        declare = registry.resource(*before, name=name, check="check", required=required)
        before = (declare(make),)
    return registry


def raised_by(mode: str) -> type[BaseException]:
    """Return what a phase that misbehaves fails with."""
    return {"raises": BoomError, "hangs": DeadlineError, "interrupts": Interrupt}[mode]


def predicted(world: World) -> Iterator[tuple[Any, ...]]:
    """Yield the whole event log that the contract asks for."""
    opened: list[str] = []
    fails_at_start = world.phase in STARTS and world.mode != "fine"
    name = ""
    for name in NAMES:
        yield ("Opening", name)
        if fails_at_start and name in world.bad:
            break
        yield ("Opened", name)
        opened.append(name)
    if fails_at_start:
        if world.mode in CANCELS:
            yield ("Stopping",)
            yield ("OpenFailed", name, type(None))
        else:
            yield ("OpenFailed", name, raised_by(world.mode))
        if world.phase == "check":
            yield ("Closing", name)
        if world.mode not in CANCELS:
            yield ("Stopping",)
        if world.phase == "check":
            yield ("Closed", name, True)
    else:
        yield ("Started",)
        yield ("Stopping",)
    for name in reversed(opened):
        yield ("Closing", name)
        yield from predicted_failures(world, name)
    yield ("Stopped",)


def predicted_failures(world: World, name: str) -> Iterator[tuple[Any, ...]]:
    """Yield what follows a Closing."""
    bad = name in world.bad
    fails = bad and world.mode not in ("fine", *CANCELS)
    if bad and world.phase == "terminate":
        yield ("CloseFailed", name, "close", BoomError)
        yield ("Terminated", name)
        if fails:
            yield ("CloseFailed", name, "terminate", raised_by(world.mode))
        yield ("Closed", name, False)
    elif fails and world.phase in ("close", "wait_closed"):
        yield ("CloseFailed", name, world.phase, raised_by(world.mode))
        yield ("Terminated", name)
        yield ("Closed", name, False)
    else:
        yield ("Closed", name, True)


async def run(world: World) -> BaseException | None:
    """Run the chain in a caller that can be cancelled; return what came out of the lifespan."""
    outcome: list[BaseException] = []

    async def caller() -> None:
        try:
            async with chain(world).lifespan():
                await checkpoint()
            await checkpoint()  # where a cancelled scope says so
        except BaseException as error:
            outcome.append(error)
            raise

    on_asyncio = asyncio._get_running_loop() is not None
    with CancelScope() as scope:
        world.cancel = scope.cancel
        try:
            if on_asyncio and world.mode != "scope_cancelled":
                task = asyncio.create_task(caller())
                world.cancel, world.by_task = task.cancel, True
                await asyncio.wait([task])
                task.result()
            else:
                await caller()
        except anyio.get_cancelled_exc_class():
            if not world.by_task:
                raise  # it is the scope's to catch
        except (BoomError, Interrupt, StartupError, ShutdownError):
            pass  # it is in the outcome
    return outcome[0] if outcome else None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("backend", ["asyncio", "trio", "uvloop"])
def test_the_whole_story_is_as_predicted(backend: str, phase: str, mode: str, place: str) -> None:
    async def main() -> None:
        world = World(phase, mode, PLACES[place])
        before = tasks_alive()
        raised = await run(world)
        assert world.log == list(predicted(world))
        assert_each_closed_once(world)
        assert_nothing_hidden(world, raised)
        assert tasks_alive() == before

    if backend != "uvloop":
        virtual_time.run(main, backend)
    elif mode != "hangs":  # its clock can't jump
        anyio.run(main, backend_options={"use_uvloop": True})


def assert_each_closed_once(world: World) -> None:
    """What opened is closed once, what did not is never closed, no phase runs twice."""
    assert len(world.calls) == len(set(world.calls))
    made = {name for name in NAMES if (name, "check") in world.calls}
    assert {name for name, phase in world.calls if phase == "close"} == made


def assert_nothing_hidden(world: World, raised: BaseException | None) -> None:
    """Every failure comes out: as it is where it must be delivered, else in one group."""
    failed = [
        entry for entry in world.log if entry[0].endswith("Failed") and entry[-1] is not type(None)
    ]
    cancelled = anyio.get_cancelled_exc_class()
    group: BaseException | None
    if world.mode in CANCELS and (world.by_task or world.phase in STARTS or not failed):
        assert isinstance(raised, cancelled)
        group = raised.__context__
    elif world.mode == "interrupts":
        assert isinstance(raised, Interrupt)
        group = raised.__context__
    else:
        group = raised
    shown = [type(error) for error in leaves(group)]
    assert shown == [entry[-1] for entry in failed if entry[-1] is not Interrupt]
    if world.mode in ("raises", "hangs") and world.phase in STARTS:
        assert isinstance(raised, StartupError)
        culprit = next(name for name in NAMES if name in world.bad)
        assert raised.failures[0][0] == culprit
        assert raised.not_begun == NAMES[NAMES.index(culprit) + 1 :]
        assert raised.opened == NAMES[: NAMES.index(culprit)]
    elif failed and world.mode in ("raises", "hangs"):
        assert isinstance(raised, ShutdownError)
        assert [name for name, _ in raised.failures] == [entry[1] for entry in failed]


def leaves(error: object) -> Iterator[BaseException]:
    """Yield the errors that a group holds, groups in it opened; none of anything else."""
    if isinstance(error, ExceptionGroup):
        for inner in cast("ExceptionGroup[Exception]", error).exceptions:
            nested = list(leaves(cast("object", inner)))
            yield from nested or [inner]


# -- what changes while it runs ----------------------------------------------------------------------

within = pytest.mark.parametrize("backend", ["asyncio", "trio"])
badly = pytest.mark.parametrize("mode", ["fine", "raises", "hangs"])


def fine_and_bad(phase: str, mode: str, place: str) -> tuple[World, World]:
    """Return two that tell one story, of which the second misbehaves."""
    bad = World(phase, mode, PLACES[place])
    return World(phase, "fine", (), bad.calls, bad.log), bad


def opened_all() -> Iterator[tuple[Any, ...]]:
    """Yield how all open."""
    for name in NAMES:
        yield from (("Opening", name), ("Opened", name))


def closed_all(names: Iterable[str] = NAMES) -> Iterator[tuple[Any, ...]]:
    """Yield how these close, in order."""
    for name in reversed([*names]):
        yield from (("Closing", name), ("Closed", name, True))


def renewed(world: World) -> Iterator[tuple[Any, ...]]:
    """Yield what a renewal adds to the log: of the new ones that fail to open, else of the old ones."""
    culprit = next(name for name in NAMES if name in world.bad)
    if world.phase not in STARTS or world.mode == "fine":
        yield from (*opened_all(), ("Renewed", "first"))
        for name in reversed(NAMES):
            yield ("Closing", name)
            yield from predicted_failures(world, name)
        return
    opened = NAMES[: NAMES.index(culprit)]
    for name in opened:
        yield from (("Opening", name), ("Opened", name))
    yield from (("Opening", culprit), ("OpenFailed", culprit, raised_by(world.mode)))
    if world.phase == "check":
        yield from closed_all([culprit])
    yield from (*closed_all(opened), ("RenewalFailed", "first"))


@pytest.mark.parametrize("place", PLACES)
@badly
@pytest.mark.parametrize("phase", PHASES)
@within
def test_the_whole_story_of_a_renewal_is_as_predicted(
    backend: str, phase: str, mode: str, place: str
) -> None:
    async def main() -> None:
        fine, bad = fine_and_bad(phase, mode, place)
        attempts = (fine, bad) if phase in STARTS else (bad, fine)
        before = tasks_alive()
        registry = chain(*attempts)
        async with registry.lifespan() as lifespan:
            with suppress(StartupError):
                await lifespan.renew(registry.plan().resources[0])
            await anyio.sleep(100)
        assert bad.log == [
            *(*opened_all(), ("Started",), *renewed(bad)),
            *(("Stopping",), *closed_all(), ("Stopped",)),
        ]
        assert tasks_alive() == before

    virtual_time.run(main, backend)


def arrived(world: World) -> Iterator[tuple[Any, ...]]:
    """Yield how all open that are not required, each of the bad at its second attempt."""
    started = False
    for name in NAMES:
        if name in world.bad and world.mode != "fine":
            yield from (("Opening", name), ("Unavailable", name))
            if not started:
                yield ("Started",)
            started = True
            if world.phase == "check":
                yield from closed_all([name])
        yield from (("Opening", name), ("Opened", name))
    if not started:
        yield ("Started",)


@pytest.mark.parametrize("place", PLACES)
@badly
@pytest.mark.parametrize("phase", STARTS)
@within
def test_the_whole_story_of_what_is_not_required_is_as_predicted(
    backend: str, phase: str, mode: str, place: str
) -> None:
    async def main() -> None:
        fine, bad = fine_and_bad(phase, mode, place)
        before = tasks_alive()
        async with chain(bad, fine, required=False).lifespan():
            await anyio.sleep(200)
        assert bad.log == [*arrived(bad), ("Stopping",), *closed_all(), ("Stopped",)]
        assert tasks_alive() == before

    virtual_time.run(main, backend)
