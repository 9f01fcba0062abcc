"""What lifekit takes before anything runs, and while nothing happens: its import, its memory."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager
from functools import partial

import anyio
import anyio.lowlevel

from lifekit import Registry

from .measure import Row, best_ratio, interleave, on, paired_ratio

# -- import --------------------------------------------------------------------------------------

TIMED_IMPORT = """
from time import perf_counter
began = perf_counter()
import {}
print(perf_counter() - began)
"""


def imports(*, rounds: int = 40) -> list[Row]:
    """Compare ``import lifekit`` with the import of what it stands on."""

    async def measured() -> list[Row]:
        with tempfile.TemporaryDirectory(prefix="lifekit-bench-") as bytecode:
            # The first, uncounted run of each writes the bytecode of all that it imports here,
            # also where the environment forbids Python to write any.
            environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
            environment.pop("PYTHONDONTWRITEBYTECODE", None)

            async def seconds(modules: str) -> float:
                command = [sys.executable, "-c", TIMED_IMPORT.format(modules)]
                ran = await anyio.run_process(command, env=environment)
                return float(ran.stdout)

            floor, ours = await interleave(
                rounds,
                partial(seconds, "asyncio, anyio"),
                partial(seconds, "lifekit._core.registry"),
            )
        # In pairs: no two processes are alike, but neighbours find the same host.
        ratio = paired_ratio(floor, ours)
        what = "import lifekit: import asyncio, anyio"
        return [Row(what, min(floor), min(ours), ratio, "ms", most=1.2)]

    return on("asyncio", measured)


# -- memory --------------------------------------------------------------------------------------


@contextmanager
def tracing() -> Generator[None]:
    """Trace allocations in a block, unless something traces them already."""
    if tracemalloc.is_tracing():
        yield
        return
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def allocated() -> int:
    """Return the bytes in use that were allocated since the tracing began."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def let_go() -> None:
    """Let the loop drop what the measurement before has left to its callbacks."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


async def task_bytes(count: int, *, shared: bool = False) -> float:
    """Return the bytes of one parked task of *count*."""

    async def park(event: anyio.Event) -> None:
        await event.wait()

    events: list[anyio.Event] = []
    parked = 0
    await let_go()
    async with anyio.create_task_group() as group:
        before = allocated()
        event = anyio.Event()
        for _ in range(count):
            if not shared:
                event = anyio.Event()
            events.append(event)
            group.start_soon(park, event)
        await anyio.lowlevel.checkpoint()
        parked = allocated() - before
        for event in events:
            event.set()
    return parked / count


async def resource_bytes(count: int, *, closing: bool = False) -> float:
    """Return the bytes that one live resource of *count* adds to its declaration and its value."""
    values = [object() for _ in range(count)]

    def returning(value: object) -> Callable[[], object]:
        return lambda: value

    def yielding(value: object) -> Callable[[], AsyncIterator[object]]:
        async def factory() -> AsyncIterator[object]:
            yield value

        return factory

    registry = Registry("memory")
    for index, value in enumerate(values):
        if closing:
            registry.resource(name=f"r{index}")(yielding(value))
        else:
            registry.resource(name=f"r{index}")(returning(value))
    await let_go()
    before = allocated()
    async with registry.lifespan():
        return (allocated() - before) / count


def memory(*, rounds: int = 3, count: int = 2000) -> list[Row]:
    """Compare the memory of a live resource, beyond its value, with that of a parked task."""

    async def measured() -> list[Row]:
        with tracing():
            own_event, shared_event, ours, ours_closing = await interleave(
                rounds,
                partial(task_bytes, count),
                partial(task_bytes, count, shared=True),
                partial(resource_bytes, count),
                partial(resource_bytes, count, closing=True),
            )
        # The least: the same every time but for what a library happens to cache meanwhile.
        return [
            Row(what, min(floor), min(mine), best_ratio(floor, mine), "B", most=bar)
            for what, floor, mine, bar in (
                ("memory of a live resource: a parked task, its event", own_event, ours, 2.0),
                ("... a parked task without its event", shared_event, ours, float("inf")),
                (
                    "... an async generator: a parked task, its event",
                    own_event,
                    ours_closing,
                    float("inf"),
                ),
            )
        ]

    return on("asyncio", measured)
