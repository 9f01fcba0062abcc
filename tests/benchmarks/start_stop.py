"""Starting and stopping a lifespan, against the same waits and tasks without lifekit."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from functools import partial
from time import perf_counter, process_time

import anyio
import anyio.lowlevel

from lifekit import Registry, Resource

from .measure import (
    BACKENDS,
    Collector,
    Row,
    Take,
    best_ratio,
    collecting,
    interleave,
    on,
    paired_ratio,
)


class Value:
    """A value that nothing needs to open or close."""


async def start_and_stop(
    registry: Registry, *, clock: Callable[[], float], collector: Collector = "on"
) -> float:
    """Return the seconds from entering a lifespan to having left it."""
    with collecting(collector):
        began = clock()
        async with registry.lifespan():
            pass
        return clock() - began


# -- resources that take time --------------------------------------------------------------------


def layers(count: int, depth: int, seconds: float) -> Registry:
    """Declare *count* resources in *depth* layers; each needs two of the layer before."""

    async def slow(*needs: object) -> AsyncIterator[Value]:
        await anyio.sleep(seconds)
        yield Value()
        await anyio.sleep(seconds)

    registry = Registry("layers")
    before: list[Resource[Value]] = []
    for layer in range(depth):
        names = [f"r{layer}_{index}" for index in range(count // depth)]
        before = [
            registry.resource(before[index], before[index - 1], name=name)(slow)
            if before
            else registry.resource(name=name)(slow)
            for index, name in enumerate(names)
        ]
    return registry


async def sleep_one_after_another(times: int, seconds: float) -> float:
    """Return the seconds of a chain of sleeps."""
    began = perf_counter()
    for _ in range(times):
        await anyio.sleep(seconds)
    return perf_counter() - began


def critical_path(
    *, rounds: int = 10, count: int = 40, depth: int = 4, seconds: float = 0.05
) -> list[Row]:
    """Compare a start and stop along a graph with the sleeps of its longest chain."""

    async def measured(backend: str) -> list[Row]:
        floor, ours = await interleave(
            rounds,
            partial(sleep_one_after_another, 2 * depth, seconds),
            partial(start_and_stop, layers(count, depth, seconds), clock=perf_counter),
        )
        # The least: a round lasts as long as its timers, and a busy host only adds to that.
        return [
            Row(
                f"{count} resources of 2 x {seconds * 1e3:.0f} ms, depth {depth}: "
                f"critical path ({backend})",
                min(floor),
                min(ours),
                best_ratio(floor, ours),
                "ms",
                most=1.05 if backend == "asyncio" else math.inf,
            )
        ]

    return [row for backend in BACKENDS for row in on(backend, partial(measured, backend))]


# -- resources that do nothing -------------------------------------------------------------------

# By processor time: nothing waits here, and what the host gives to others meanwhile does not count.


def idle(count: int, *, closing: bool = False) -> Registry:
    """Declare *count* resources that do nothing; *closing* ones are generators."""

    async def with_closing() -> AsyncIterator[Value]:
        yield Value()

    registry = Registry("idle")
    for index in range(count):
        if closing:
            registry.resource(name=f"r{index}")(with_closing)
        else:
            registry.resource(name=f"r{index}")(Value)
    return registry


async def park_and_wake(count: int, *, shared: bool = False, collector: Collector = "on") -> float:
    """Return the seconds to start *count* tasks, have them wait, wake them, and see them end."""

    async def park(event: anyio.Event) -> None:
        await event.wait()

    with collecting(collector):
        began = process_time()
        event = anyio.Event()
        events: list[anyio.Event] = []
        async with anyio.create_task_group() as group:
            for _ in range(count):
                if not shared:
                    event = anyio.Event()
                events.append(event)
                group.start_soon(park, event)
            await anyio.lowlevel.checkpoint()  # which all of them reach their event before
            for event in events:
                event.set()
        return process_time() - began


def many(*, rounds: int = 25, count: int = 1000) -> list[Row]:
    """Compare resources that do nothing with parked tasks."""

    async def measured(backend: str) -> list[Row]:
        plain, closing = idle(count), idle(count, closing=True)
        own_event, shared_event, ours, ours_closing = await interleave(
            rounds,
            partial(park_and_wake, count),
            partial(park_and_wake, count, shared=True),
            partial(start_and_stop, plain, clock=process_time),
            partial(start_and_stop, closing, clock=process_time),
        )

        def row(what: str, floor: list[float], mine: list[float], most: float = math.inf) -> Row:
            what = f"{count:,} {what} ({backend})"
            # In pairs: a round takes some 50 ms, short enough for both to find the host alike.
            return Row(what, min(floor), min(mine), paired_ratio(floor, mine), "ms", most=most)

        most = 2.0 if backend == "asyncio" else math.inf
        return [
            row("idle resources: parked tasks, an event each", own_event, ours, most),
            row("idle resources: parked tasks, one shared event", shared_event, ours),
            row("idle async generators: parked tasks, an event each", own_event, ours_closing),
        ]

    return [row for backend in BACKENDS for row in on(backend, partial(measured, backend))]


def growth(*, rounds: int = 4, small: int = 1000, big: int = 10_000) -> list[Row]:
    """Compare the cost per resource, and per parked task, of many with that of few."""

    async def measured(backend: str, collector: Collector) -> list[Row]:
        registries = {count: idle(count) for count in (small, big)}

        async def task(count: int) -> float:
            times = big // count  # as much work for the small count as for the big one
            return sum([await park_and_wake(count, collector=collector) for _ in range(times)]) / big

        async def resource(count: int) -> float:
            times, registry = big // count, registries[count]
            started: Take = partial(start_and_stop, registry, clock=process_time, collector=collector)
            return sum([await started() for _ in range(times)]) / big

        few_tasks, few, many_tasks, many = await interleave(
            rounds,
            partial(task, small),
            partial(resource, small),
            partial(task, big),
            partial(resource, big),
        )
        span, where = f"{small:,} -> {big:,}", f"({backend}, gc {collector})"
        most = 1.2 if backend == "asyncio" and collector == "on" else math.inf
        # In pairs: a host that was fast in one second and slow in the next gives absurd minima.
        return [
            Row(
                f"each resource, {span} {where}",
                min(few),
                min(many),
                paired_ratio(few, many),
                "us",
                most=most,
            ),
            Row(
                f"each parked task, {span} {where}",
                min(few_tasks),
                min(many_tasks),
                paired_ratio(few_tasks, many_tasks),
                "us",
            ),
        ]

    modes: list[tuple[str, Collector]] = [
        ("asyncio", "on"),
        ("uvloop", "on"),
        ("trio", "on"),
        ("asyncio", "off"),
        ("asyncio", "frozen"),
    ]
    return [row for mode in modes for row in on(mode[0], partial(measured, *mode))]
