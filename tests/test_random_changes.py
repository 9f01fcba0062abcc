"""Random graphs whose parts fail, come late and are renewed keep every promise while they run.

Beside `test_random_graphs.py`, which is about one start and one stop. In virtual time.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from anyio import CancelScope
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifekit import CrashError, LifekitError, Registry, ShutdownError, StartupError, events

from . import virtual_time
from .depth import TIMES
from .leaks import tasks_alive
from .test_failure_product import BoomError

START_TIMEOUT, CLOSE_TIMEOUT, GRACE = 30.0, 10.0, 25.0
OPENS = ("fine", "fine", "delay", "boom", "hang", "stubborn", "late")
CLOSES = ("fine", "fine", "fine", "delay", "boom", "hang")


@dataclass(frozen=True)
class Spec:
    """How one resource behaves, at its first attempts; all later ones are fine."""

    needs: tuple[int, ...]
    after: tuple[int, ...]
    required: bool
    renew_every: float | None
    opens: tuple[str, ...]
    close: str


@dataclass(frozen=True)
class Case:
    """A graph, what its workers need, what is renewed when, and when it ends."""

    specs: tuple[Spec, ...]
    workers: tuple[tuple[tuple[int, ...], float], ...]
    renewals: tuple[tuple[float, int, float], ...]
    """When, what, and after how many seconds the caller is cancelled."""
    ends: float


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a graph of up to 12 resources."""
    size = draw(st.integers(1, 12))
    specs: list[Spec] = []
    for index in range(size):
        earlier = st.lists(st.integers(0, index - 1), max_size=3, unique=True) if index else st.just([])
        needs, after = draw(earlier), draw(earlier) if draw(st.integers(0, 4)) == 0 else []
        optional = any(not specs[need].required for need in (*needs, *after)) or draw(st.booleans())
        later = draw(st.lists(st.sampled_from(OPENS), max_size=3))
        first = draw(st.sampled_from(OPENS if optional else ("fine", "fine", "fine", "delay")))
        spec = Spec(
            needs=tuple(needs),
            after=tuple(after),
            required=not optional,
            renew_every=draw(st.sampled_from((None, None, 7.0, 40.0))),
            opens=(first, *later),
            close=draw(st.sampled_from(CLOSES)),
        )
        specs.append(spec)
    needs_of_workers = st.lists(st.integers(0, size - 1), max_size=3, unique=True).map(tuple)
    times = st.floats(0, 100)
    return Case(
        tuple(specs),
        tuple(draw(st.lists(st.tuples(needs_of_workers, st.sampled_from((0.0, 5.0))), max_size=3))),
        tuple(
            draw(st.lists(st.tuples(times, st.integers(0, size - 1), st.floats(0.1, 200)), max_size=6))
        ),
        draw(st.sampled_from((0.0, 3.0, 50.0, 400.0))),
    )


class Part:
    """One value, and what it was built from."""

    def __init__(self, world: World, name: str, needs: tuple[Part, ...]) -> None:
        assert all(need.is_open for need in needs), f"{name} was built from what is closed"
        self.name, self.number = name, world.made[name]
        self.needs = needs
        self.users: list[object] = []
        self.is_open: bool = True
        world.made[name] += 1
        world.parts.append(self)
        for need in needs:
            need.users.append(self)

    def is_let_go(self, by: object) -> None:
        for need in self.needs:
            need.users.remove(by)


@dataclass
class World:
    """One run of a case, and all that was seen of it."""

    case: Case
    parts: list[Part] = field(default_factory=list[Part])
    made: Counter[str] = field(default_factory=Counter[str])
    attempts: Counter[str] = field(default_factory=Counter[str])
    at_work: Counter[str] = field(default_factory=Counter[str])
    log: list[events.Event] = field(default_factory=list[events.Event])
    wrong: list[str] = field(default_factory=list[str])
    released: anyio.Event = field(default_factory=anyio.Event)
    handles: list[Any] = field(default_factory=list[Any])

    async def act(self, how: str) -> None:
        """Behave."""
        match how:
            case "delay":
                await anyio.sleep(0.7)
            case "boom":
                raise BoomError
            case "hang":
                await anyio.sleep_forever()
            case "stubborn":
                with CancelScope(shield=True):
                    await self.released.wait()
                    raise BoomError
            case "late":
                with CancelScope(shield=True):
                    await anyio.sleep(START_TIMEOUT + 0.5)
            case _:
                pass

    def factory(self, name: str, spec: Spec) -> Callable[..., Any]:
        async def make(*needs: Part) -> AsyncGenerator[Part]:
            attempt = self.attempts[name]
            self.attempts[name] += 1
            await self.act(spec.opens[attempt] if attempt < len(spec.opens) else "fine")
            part = Part(self, name, needs)
            yield part
            if part.users:
                self.wrong.append(f"{name} closed under {part.users}")
            try:
                await self.act(spec.close)
            finally:
                part.is_open = False
                part.is_let_go(part)

        return make

    def worker(self, name: str) -> Callable[..., Any]:
        async def work(*needs: Part) -> None:
            self.at_work[name] += 1
            if self.at_work[name] > 1:
                self.wrong.append(f"{name} runs twice")
            if not all(need.is_open for need in needs):
                self.wrong.append(f"{name} works with what is closed")
            for need in needs:
                need.users.append(name)
            try:
                await anyio.sleep_forever()
            finally:
                with CancelScope(shield=True):
                    await anyio.sleep(0.3)
                self.at_work[name] -= 1
                for need in needs:
                    need.users.remove(name)

        return work

    def declare(self) -> Registry:
        registry = Registry(
            start_timeout=START_TIMEOUT,
            close_timeout=CLOSE_TIMEOUT,
            grace=GRACE,
            on_event=self.log.append,
        )
        for index, spec in enumerate(self.case.specs):
            name = f"r{index}"
            declare = registry.resource(
                *[self.handles[need] for need in spec.needs],
                after=[self.handles[need] for need in spec.after],
                name=name,
                required=spec.required,
                renew_every=spec.renew_every,
            )
            self.handles.append(declare(self.factory(name, spec)))
        for index, (needs, drain) in enumerate(self.case.workers):
            needed = [self.handles[need] for need in needs]
            registry.worker(*needed, name=f"w{index}", drain=drain)(self.worker(f"w{index}"))
        return registry

    def look(self, lifespan: Any) -> None:
        """Hold what is visible now against the contract: one generation, and open."""
        for handle in self.handles:
            if (part := lifespan.live.get(handle)) is not None:
                if not part.is_open:
                    self.wrong.append(f"{part.name} is visible, and closed")
                for need, seen in zip(handle.needs, part.needs, strict=True):
                    if lifespan.live.get(need) is not seen:
                        self.wrong.append(f"{part.name} was built from another {need.name}")
            elif handle.options.required:
                self.wrong.append(f"{handle.name} is not there")

    async def renew(self, lifespan: Any, at: float, index: int, patience: float) -> None:
        handle = self.handles[index]
        await anyio.sleep(at)
        before = lifespan.live.get(handle)
        try:
            with anyio.move_on_after(patience) as scope:
                await lifespan.renew(handle)
            if not scope.cancelled_caught and lifespan.live.get(handle) is before:
                self.wrong.append(f"{handle.name} was renewed, and is the same")
        except LifekitError:
            pass


async def live(world: World) -> BaseException | None:
    """Run the case; return what came out."""
    lifespan = world.declare().lifespan()
    try:
        async with lifespan, anyio.create_task_group() as tasks:
            for renewal in world.case.renewals:
                tasks.start_soon(world.renew, lifespan, *renewal)
            until = anyio.current_time() + world.case.ends
            while anyio.current_time() < until:
                world.look(lifespan)
                await anyio.sleep(0.5)
            if world.case.ends > 300:  # long enough for all that comes late
                missing = [each.name for each in world.handles if each not in lifespan.live]
                if missing:
                    world.wrong.append(f"{missing} never came")
            tasks.cancel_scope.cancel()
    except (StartupError, ShutdownError, CrashError) as error:
        return error
    return None


def assert_promises_kept(world: World, raised: BaseException | None) -> None:
    assert world.wrong == []
    assert not isinstance(raised, StartupError | CrashError)  # none that is required fails at first
    kinds = [type(event) for event in world.log]
    assert kinds.count(events.Stopped) == kinds.count(events.Started) == 1
    assert kinds[-1] is events.Stopped
    assert kinds.count(events.WorkerStarted) == kinds.count(events.WorkerEnded)
    assert kinds.count(events.Closing) == kinds.count(events.Closed)
    assert kinds.count(events.Opened) <= kinds.count(events.Closed)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of failures are on purpose."""
    logging.disable()
    yield
    gc.collect()
    logging.disable(logging.NOTSET)


def check(case: Case) -> None:
    """Run a case on both backends."""
    for backend in ("asyncio", "trio"):

        async def main() -> None:
            world = World(case)
            before = tasks_alive()
            try:
                raised = await live(world)
                assert_promises_kept(world, raised)
            finally:
                world.released.set()
            await anyio.sleep(10 * START_TIMEOUT)  # even the late and the stubborn end
            assert tasks_alive() == before
            assert not any(part.is_open for part in world.parts)

        virtual_time.run(main, backend)


quickly = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@settings(quickly, max_examples=15)
@given(cases())
def test_random_changes_keep_every_promise(case: Case) -> None:
    check(case)


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(quickly, max_examples=40 * TIMES)
@given(cases())
def test_many_random_changes_keep_every_promise(case: Case) -> None:
    check(case)
