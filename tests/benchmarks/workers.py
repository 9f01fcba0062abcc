"""Workers beside parked tasks and blocks without any, and what `until` adds to a loop."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from functools import partial
from time import process_time

import anyio
from anyio.lowlevel import checkpoint

import lifekit
from lifekit import Lifespan, Registry, testing

from .measure import BACKENDS, Row, best_ratio, interleave, on, paired_ratio
from .start_stop import park_and_wake, start_and_stop


def working(count: int) -> Registry:
    """Declare *count* workers that wait."""

    async def worker() -> None:
        await anyio.Event().wait()

    registry = Registry("working")
    for index in range(count):
        registry.worker(name=f"w{index}")(worker)
    return registry


def workers(*, rounds: int = 200, count: int = 100) -> list[Row]:
    """Compare the start and stop of workers with parked tasks."""

    async def measured(backend: str) -> list[Row]:
        floor, ours = await interleave(
            rounds,
            partial(park_and_wake, count),
            partial(start_and_stop, working(count), clock=process_time),
        )
        what = f"{count} workers: parked tasks, an event each ({backend})"
        ratio = paired_ratio(floor, ours)
        most = 1.5 if backend == "asyncio" else math.inf
        return [Row(what, min(floor), min(ours), ratio, "ms", most=most)]

    return [row for backend in BACKENDS for row in on(backend, partial(measured, backend))]


def blocks(*, rounds: int = 200, count: int = 3) -> list[Row]:
    """Compare a block in which workers run with one in which none does."""

    async def block(lifespan: Lifespan, *, workers: bool) -> float:
        began = process_time()
        async with lifespan.sandbox(workers=workers):
            await checkpoint()
        return process_time() - began

    async def measured(backend: str) -> list[Row]:
        with testing.sandboxing():
            async with working(count).lifespan() as lifespan:
                floor, ours = await interleave(
                    rounds,
                    partial(block, lifespan, workers=False),
                    partial(block, lifespan, workers=True),
                )
        what = f"a block with {count} workers: without ({backend})"
        more = 0.3e-3 if backend == "asyncio" else math.inf
        ratio = best_ratio(floor, ours)
        return [Row(what, min(floor), min(ours), ratio, "ms", most_more=more)]

    return [row for backend in BACKENDS for row in on(backend, partial(measured, backend))]


def until(*, rounds: int = 20, items: int = 10_000) -> list[Row]:
    """Compare a loop over items that are there with the same under `until`."""

    async def numbers() -> AsyncGenerator[int]:
        for number in range(items):
            yield number

    async def bare() -> float:
        began = process_time()
        async for _ in numbers():
            pass
        return (process_time() - began) / items

    async def noticed() -> float:
        began = process_time()
        async for _ in lifekit.stopping().until(numbers()):
            pass
        return (process_time() - began) / items

    async def measured(backend: str) -> list[Row]:
        async with Registry("until").lifespan():
            floor, ours = await interleave(rounds, bare, noticed)
        what = f"until(), each item: a loop without ({backend})"
        more = 1e-6 if backend == "asyncio" else math.inf
        return [Row(what, min(floor), min(ours), best_ratio(floor, ours), "us", most_more=more)]

    return [row for backend in BACKENDS for row in on(backend, partial(measured, backend))]
