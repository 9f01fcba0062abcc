"""Random graphs with random failures, hangs, delays and cancellations keep every promise.

In virtual time, so that hangs and deadlines cost nothing.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from anyio import CancelScope
from anyio.lowlevel import checkpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import lifekit
from lifekit import CrashError, Registry, ShutdownError, StartupError, events

from . import virtual_time
from .depth import TIMES
from .leaks import tasks_alive
from .test_failure_product import BoomError, Interrupt, leaves

STYLES = ("value", "generator", "manager", "task_group")
ACTS = ("fine", "fine", "fine", "delay", "delay", "boom", "hang", "stubborn", "late", "interrupt")
DEEDS = ("fine", "delay", "boom", "hang", "stubborn")
START_TIMEOUT, CLOSE_TIMEOUT, GRACE = 30.0, 10.0, 25.0


@dataclass(frozen=True)
class Spec:
    """How one resource behaves."""

    style: str
    needs: tuple[int, ...]
    after: tuple[int, ...]
    open: str
    close: str
    wait_closed: str
    terminate: str


@dataclass(frozen=True)
class Job:
    """How one worker behaves: as it begins, as it runs, and once it is told to end."""

    needs: tuple[int, ...]
    begin: str
    run: str
    told: str
    waits: bool  # for the notice; else it is cancelled amid what it does
    drain: float
    every: float | None
    restart: Any
    on_crash: Any


@dataclass(frozen=True)
class Case:
    """A graph, and when and how its caller is cancelled: at which act, how often, by what."""

    specs: tuple[Spec, ...]
    workers: tuple[Job, ...]
    lasts: float  # seconds that its body takes
    cancel_at: int | None
    times: int
    by: str  # "task", "scope" or "all tasks"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a graph of up to 30 resources; most behave, some do not."""
    size = draw(st.integers(1, 30))
    # In a calm graph openings succeed, so that closings get their turn, or both, so that workers do.
    mood = draw(st.sampled_from(("wild", "openings are calm", "calm")))
    opens = st.sampled_from(ACTS if mood == "wild" else ("fine", "delay"))
    closes = st.sampled_from(("fine", "delay") if mood == "calm" else ACTS)
    specs: list[Spec] = []
    for index in range(size):
        earlier = st.lists(st.integers(0, index - 1), max_size=3, unique=True) if index else st.just([])
        spec = Spec(
            style=draw(st.sampled_from(STYLES)),
            needs=tuple(draw(earlier)),
            after=tuple(draw(earlier)) if draw(st.integers(0, 5)) == 0 else (),
            open=draw(opens),
            close=draw(closes),
            wait_closed=draw(closes),
            terminate=draw(closes),
        )
        specs.append(spec)
    needs = st.lists(st.integers(0, size - 1), max_size=3, unique=True).map(tuple)
    jobs = st.builds(
        Job,
        needs=needs,
        begin=st.sampled_from(("fine", "fine", "delay", "boom", "hang")),
        run=st.sampled_from(DEEDS),
        told=st.sampled_from(DEEDS),
        waits=st.booleans(),
        drain=st.sampled_from((0.0, 5.0)),
        every=st.sampled_from((None, None, 1.0)),
        restart=st.sampled_from(("on-failure", "always", "never")),
        on_crash=st.sampled_from(("stop", "stop", "unready", "ignore")),
    )
    workers = draw(st.lists(jobs, min_size=int(mood == "calm"), max_size=3))
    lasts = draw(st.sampled_from((0.0, 0.5, 5.0)))
    cancel_at = draw(st.none() | st.integers(1, 4 * size))
    by = draw(st.sampled_from(("task", "scope", "all tasks")))
    return Case(tuple(specs), tuple(workers), lasts, cancel_at, draw(st.integers(1, 3)), by)


@dataclass
class World:
    """One run of a case, and all that was seen of it."""

    case: Case
    made: Counter[str] = field(default_factory=Counter[str])
    closed: Counter[str] = field(default_factory=Counter[str])
    terminated: Counter[str] = field(default_factory=Counter[str])
    failures: list[BaseException] = field(default_factory=list[BaseException])
    log: list[events.Event] = field(default_factory=list[events.Event])
    acts: int = 0
    cancel: Callable[[], object] = lambda: None
    cancelled: bool = False
    released: anyio.Event = field(
        default_factory=anyio.Event
    )  # ends what ignores its cancellation, once the test has seen enough

    async def act(self, how: str) -> None:
        """Behave."""
        self.acts += 1
        if self.acts == self.case.cancel_at:
            self.cancelled = True
            for _ in range(self.case.times):
                self.cancel()
        if how in ("boom", "interrupt"):
            self.failures.append(BoomError() if how == "boom" else Interrupt())
            raise self.failures[-1]
        await self.deed(how)

    async def deed(self, how: str) -> None:
        """Behave, as workers do as well."""
        match how:
            case "delay":
                await anyio.sleep(0.1)
            case "boom":
                raise BoomError
            case "hang":
                await anyio.sleep_forever()
            case "stubborn":
                with CancelScope(shield=True):
                    await self.released.wait()
            case "late":
                with CancelScope(shield=True):
                    await anyio.sleep(START_TIMEOUT + 0.5)
            case _:
                pass


class Part:
    """A value with every phase."""

    def __init__(self, world: World, name: str, spec: Spec) -> None:
        self.world, self.name, self.spec = world, name, spec
        world.made[name] += 1

    async def close(self) -> None:
        self.world.closed[self.name] += 1
        await self.world.act(self.spec.close)

    async def wait_closed(self) -> None:
        await self.world.act(self.spec.wait_closed)

    async def terminate(self) -> None:
        self.world.terminated[self.name] += 1
        await self.world.act(self.spec.terminate)


def factory(world: World, name: str, spec: Spec) -> Callable[..., Any]:
    """Return a factory of the spec's style."""

    async def value(*_: Any) -> Part:
        await world.act(spec.open)
        return Part(world, name, spec)

    async def generator(*_: Any) -> AsyncGenerator[Any]:
        await world.act(spec.open)
        world.made[name] += 1
        yield object()
        world.closed[name] += 1
        await world.act(spec.close)

    async def task_group(*_: Any) -> AsyncGenerator[Any]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            await world.act(spec.open)
            world.made[name] += 1
            yield tasks
            world.closed[name] += 1
            tasks.cancel_scope.cancel()
        await world.act(spec.close)

    styles: dict[str, Callable[..., Any]] = {
        "value": value,
        "generator": generator,
        "manager": asynccontextmanager(generator),
        "task_group": task_group,
    }
    return styles[spec.style]


def declare(world: World) -> Registry:
    """Declare the graph."""
    registry = Registry(
        start_timeout=START_TIMEOUT,
        close_timeout=CLOSE_TIMEOUT,
        grace=GRACE,
        on_event=world.log.append,
    )
    handles: list[Any] = []
    for index, spec in enumerate(world.case.specs):
        name = f"r{index}"
        needs = [handles[need] for need in spec.needs]
        after = [handles[need] for need in spec.after]
        handles.append(registry.resource(*needs, after=after, name=name)(factory(world, name, spec)))
    for index, job in enumerate(world.case.workers):
        needed = [handles[need] for need in job.needs]
        registry.worker(
            *needed,
            name=f"w{index}",
            drain=job.drain,
            every=job.every,
            restart="on-failure" if job.every else job.restart,
            on_crash=job.on_crash,
        )(worker(world, job))
    return registry


def worker(world: World, job: Job) -> Callable[..., Any]:
    """Return a worker's function, which fails on its own: only its events tell of that."""

    async def work(*_: Any) -> None:
        await world.deed(job.begin)
        try:
            await world.deed(job.run)
            if job.waits:
                await lifekit.stopping().wait()
        finally:
            await world.deed(job.told)

    return work


async def run(world: World) -> BaseException | None:
    """Run the graph in a caller that is cancelled as the case says; return what came out."""
    outcome: list[BaseException] = []

    async def caller() -> None:
        try:
            async with declare(world).lifespan():
                await anyio.sleep(world.case.lasts)
            await checkpoint()
        except BaseException as error:
            outcome.append(error)
            raise

    with CancelScope() as scope:
        world.cancel = scope.cancel
        try:
            if world.case.by == "scope" or asyncio._get_running_loop() is None:
                await caller()
            else:
                here = asyncio.current_task()
                task = asyncio.create_task(caller())
                world.cancel = task.cancel
                if world.case.by == "all tasks":
                    world.cancel = lambda: [
                        each.cancel() for each in asyncio.all_tasks() if each is not here
                    ]
                await asyncio.gather(task, return_exceptions=True)
        except (Interrupt, BaseExceptionGroup):
            pass
    return outcome[0] if outcome else None


def assert_promises_kept(world: World, raised: BaseException | None) -> None:
    """Hold one run against the contract."""
    seen = [(type(event), getattr(event, "resource", "")) for event in world.log]
    opened = [name for kind, name in seen if kind is events.Opened]
    begun = [name for kind, name in seen if kind is events.Opening]
    position = {entry: index for index, entry in enumerate(seen)}
    assert len(begun) == len(set(begun))
    assert len(opened) == len(set(opened))
    for index, spec in enumerate(world.case.specs):
        name = f"r{index}"
        for parent in {f"r{need}" for need in spec.needs + spec.after}:
            if name in begun:  # it began when its parent was open, and its parent outlived it
                assert position[events.Opened, parent] < position[events.Opening, name]
                over = position.get((events.Closed, name), position.get((events.OpenFailed, name)))
                assert over is not None
                assert over < position[events.Closing, parent]
    for index, job in enumerate(world.case.workers):
        began = position.get((events.WorkerStarted, f"w{index}"))
        assert (began is None) == ((events.Started, "") not in seen)
        if began is not None:  # when all was open, and what it needs outlived it
            assert position[events.Started, ""] < began
            ended = position[events.WorkerEnded, f"w{index}"]
            assert all(ended < position[events.Closing, f"r{need}"] for need in job.needs)
    closing = [name for kind, name in seen if kind is events.Closing]
    closed = [name for kind, name in seen if kind is events.Closed]
    assert sorted(closing) == sorted(closed) == sorted(set(closing))
    assert set(opened) <= set(closed)
    assert seen[-1] == (events.Stopped, "")
    started = (events.Started, "") in seen
    assert started == (len(opened) == len(world.case.specs)) or world.cancelled
    if raised is None:
        assert started
        assert not world.failures
    failures = [
        event for event in world.log if isinstance(event, events.OpenFailed | events.CloseFailed)
    ]
    crashes = [each for each in world.log if isinstance(each, events.Crashed)]
    assert [each.resource for each in crashes] == list(dict.fromkeys(each.resource for each in crashes))
    fatal = [each for each in crashes if each.on_crash == "stop"]
    told = [each.error for each in (*failures, *fatal) if each.error is not None]
    assert_told(world, raised, told)
    if fatal:
        noticed = [each.reason for each in world.log if isinstance(each, events.StopNoticed)]
        assert noticed == [f"{fatal[0].resource} crashed"]


def assert_told(world: World, raised: BaseException | None, failed: list[BaseException]) -> None:
    """Every failure is in what was raised, or in its context."""
    interrupts = [error for error in failed if not isinstance(error, Exception)]
    group = raised
    groups = StartupError | ShutdownError | CrashError
    if raised is not None and not isinstance(raised, groups):
        group = raised.__context__
        assert raised in interrupts or isinstance(raised, anyio.get_cancelled_exc_class())
    told = list(leaves(group)) if isinstance(group, groups) else []
    expected = ExceptionGroup(
        "", [error for error in failed if isinstance(error, Exception)] or [BoomError()]
    )
    assert {id(error) for error in told} == {id(error) for error in leaves(expected)} or not told
    assert bool(told) == (len(failed) > len(interrupts))
    if interrupts:
        assert raised in interrupts
    elif world.cancelled and not failed:
        assert isinstance(raised, anyio.get_cancelled_exc_class())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of failures are on purpose."""
    logging.disable()
    yield
    gc.collect()  # here, where nobody minds that a coroutine never began
    logging.disable(logging.NOTSET)


def check(case: Case) -> None:
    """Run a case on both backends, on asyncio with eager tasks as well."""
    for backend, factory in [("asyncio", None), ("trio", None), *EAGER]:

        async def main(factory: Any = factory) -> None:
            if factory is not None:
                asyncio.get_running_loop().set_task_factory(factory)
            world = World(case)
            before = tasks_alive()
            try:
                raised = await run(world)
                assert_promises_kept(world, raised)
            finally:
                world.released.set()
            await anyio.sleep(10 * START_TIMEOUT)  # even the late and the stubborn end
            assert tasks_alive() == before
            assert world.made == world.closed
            assert all(times == 1 for times in world.terminated.values())

        virtual_time.run(main, backend)


EAGER: list[tuple[str, Any]] = []
if sys.version_info >= (3, 12):
    EAGER.append(("asyncio", asyncio.eager_task_factory))
quickly = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


# AnyIO's, of a child task that was cancelled before its first step.
unstarted = pytest.mark.filterwarnings("ignore:coroutine 'sleep_forever' was never awaited")


def one_job(begin: str = "fine", run: str = "hang", told: str = "fine") -> Case:
    """Return a small case, for what chance may never draw."""
    spec = Spec("generator", (), (), "fine", "fine", "fine", "fine")
    job = Job((0,), begin, run, told, False, 0.0, None, "never", "stop")
    return Case((spec,), (job,), 5.0, None, 1, "task")


@unstarted
@settings(quickly, max_examples=60)
@example(one_job(begin="boom"))
@example(one_job(begin="hang"))
@example(one_job(run="boom"))
@example(one_job(run="stubborn"))
@example(one_job(told="boom"))
@example(one_job(told="stubborn"))
@example(one_job(run="fine", told="boom"))
@given(cases())
def test_random_graphs_keep_every_promise(case: Case) -> None:
    check(case)


@unstarted
@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(quickly, max_examples=250 * TIMES, derandomize=True)
@given(cases())
def test_many_random_graphs_keep_every_promise(case: Case) -> None:
    check(case)
