"""The runs of which the pictures are: through the real engine, in virtual time.

Which thing waits for which, and when each begins and ends, comes of the run. Only how long each one
takes by itself is given.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
from shortener.resources import registry as shortener

from lifekit import Registry, Resource, ShutdownError, Worker
from lifekit._core.timeline import Timeline

from ..virtual_time import run
from .graph import Edge, draw
from .svg import Bar, Panel, Row, timeline

Factory = Callable[..., AsyncGenerator[str]]
SHORTENER: Mapping[str, tuple[float, float]] = {
    "settings": (0.0, 0.0),
    "postgres": (1.0, 0.3),
    "valkey": (0.4, 0.2),
    "db": (0.4, 0.2),
    "cache": (0.1, 0.1),
    "schema": (0.2, 0.0),
    "reports": (0.5, 0.4),
    "links": (0.1, 0.3),
}
"""Seconds for each to open and to close."""


def _lasting(name: str, opening: float, closing: float) -> Factory:
    async def factory(*_: object) -> AsyncGenerator[str]:
        await anyio.sleep(opening)
        yield name
        await anyio.sleep(closing)

    return factory


def _both(registry: Registry) -> tuple[Timeline, Timeline]:
    """Return a start and a stop, in virtual time."""
    found: list[Timeline] = []

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            pass
        found.extend((lifespan.startup, lifespan.shutdown))

    run(main, "trio")  # whose clock stands still while code runs
    return found[0], found[1]


def _panel(title: str, timeline: Timeline) -> Panel:
    rows = [
        Row(each.resource, (Bar(each.began, each.ended, each.critical),), f"{each.seconds:.1f} s")
        for each in timeline.spans
    ]
    return Panel(f"{title}: {timeline.seconds:.1f} s", tuple(rows))


# -- the example application -----------------------------------------------------------------------


def shortener_resources() -> list[Resource[Any]]:
    """All that it declares, but for its workers."""
    return [each for each in shortener.plan().resources if not isinstance(each, Worker)]


def shortener_graph() -> str:
    """What each resource of the example is built from."""
    resources = shortener_resources()
    names = [resource.name for resource in resources]
    edges = [
        Edge(other.name, resource.name, ordered=other not in resource.needs)
        for resource in resources
        for other in (*resource.needs, *resource.after)
    ]
    return draw("shortener-graph", "The resources of the example application", names, edges)


def shortener_timeline() -> str:
    """How the example starts and stops."""
    registry, handles = Registry("shortener"), dict[str, Resource[Any]]()
    for each in shortener_resources():
        needs = [handles[need.name] for need in each.needs]
        after = [handles[other.name] for other in each.after]
        declare: Any = registry.resource(*needs, after=after, name=each.name)
        handles[each.name] = declare(_lasting(each.name, *SHORTENER[each.name]))
    start, stop = _both(registry)
    return timeline(
        "shortener-timeline",
        "A start and a stop of the example application",
        "Each resource begins to open when what it needs is open, and to close when what needs it is "
        f"closed. The start took as long as {', '.join(start.critical_path)} one after the other, the "
        f"stop as long as {', '.join(stop.critical_path)}.",
        [_panel("Start", start), _panel("Stop", stop)],
    )


# -- one after another, and as needs allow ---------------------------------------------------------

FOUR: Mapping[str, float] = {"db": 1.0, "cache": 0.6, "queue": 0.8, "links": 0.3}


def one_by_one() -> str:
    """How long a start takes by hand, and along the graph."""
    bars: list[Row] = []

    async def by_hand() -> None:
        began = anyio.current_time()
        async with AsyncExitStack() as stack:
            for name, seconds in FOUR.items():
                before = anyio.current_time() - began
                await stack.enter_async_context(asynccontextmanager(_lasting(name, seconds, 0))())
                now = anyio.current_time() - began
                bars.append(Row(name, (Bar(before, now, strong=True),), f"{seconds:.1f} s"))

    run(by_hand, "trio")
    registry = Registry()
    first = [
        registry.resource(name=name)(_lasting(name, FOUR[name], 0)) for name in ("db", "cache", "queue")
    ]
    registry.resource(*first, name="links")(_lasting("links", FOUR["links"], 0))
    start, _ = _both(registry)
    total = max(row.bars[0].ended for row in bars)
    return timeline(
        "one-by-one",
        "Four resources opened one after another, and as their needs allow",
        f"In an AsyncExitStack the start takes {total:.1f} seconds, the sum of all. Along the graph "
        "db, cache and queue open at the same time, and links after them: "
        f"{start.seconds:.1f} seconds.",
        [
            Panel(f"One after another, in an AsyncExitStack: {total:.1f} s", tuple(bars)),
            _panel("As needs allow, links needing the others", start),
        ],
    )


# -- two phases ------------------------------------------------------------------------------------

CLOSE_TIMEOUT = 5.0
SERVED = 2.0
"""Seconds that pass before the closing begins."""


class Pool:
    """Three connections, one of them lent; it notes when what happens to it."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.given_back = anyio.Event()

    def note(self, what: str) -> None:
        self.times.setdefault(what, anyio.current_time())

    def close(self) -> None:
        self.note("close")  # no more are lent

    async def wait_closed(self) -> None:
        self.note("wait_closed")  # the idle ones are closed
        try:
            await self.given_back.wait()
        finally:
            self.note("waited")

    def terminate(self) -> None:
        self.note("terminate")
        self.given_back.set()


def two_phases() -> str:
    """What becomes of a pool's connections, if they are given back in time, and if not."""
    early, late = _closing(3.0), _closing(60.0)
    return timeline(
        "two-phases",
        "A pool is closed in two phases",
        "With close() a pool of aiopg refuses new work. wait_closed() closes what is idle, and lasts "
        "until the lent connection is given back; if that takes longer than the deadline, "
        f"{CLOSE_TIMEOUT:.0f} seconds here, terminate() cuts it off.",
        [
            Panel("The lent connection is given back in time", _phases(early)),
            Panel(f"It is not: the deadline is {CLOSE_TIMEOUT:.0f} s here", _phases(late)),
        ],
    )


def _closing(given_back_after: float) -> dict[str, float]:
    """Return when what happened, in seconds since the pool opened."""
    pools: list[Pool] = []
    registry = Registry(close_timeout=CLOSE_TIMEOUT)

    @registry.resource
    def pool() -> Pool:
        pools.append(Pool())
        return pools[0]

    async def give_back() -> None:
        await anyio.sleep(SERVED + given_back_after)
        pools[0].given_back.set()

    async def main() -> None:
        began = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(give_back)
            with suppress(ShutdownError):
                async with registry.lifespan():
                    await anyio.sleep(SERVED)
            pools[0].note("ended")
            tasks.cancel_scope.cancel()
        times.update({what: when - began for what, when in pools[0].times.items()})

    times: dict[str, float] = {}
    run(main, "trio")
    return times


def _phases(times: Mapping[str, float]) -> tuple[Row, ...]:
    close, end = times["close"], times["ended"]
    cut_off = "terminate" in times
    rows = [
        Row("new work", (Bar(0, close),), "is refused"),
        Row("idle", (Bar(0, times["wait_closed"]),), "are closed"),
        Row("lent", (Bar(0, end),), "is cut off" if cut_off else "is closed"),
        Row("close()", (Bar(close, times["wait_closed"], strong=True),)),
        Row("wait_closed()", (Bar(times["wait_closed"], times["waited"], strong=True),)),
    ]
    if cut_off:
        rows.append(Row("terminate()", (Bar(times["terminate"], end, strong=True),)))
    return tuple(rows)


PICTURES: Mapping[str, Callable[[], str]] = {
    "shortener-graph.svg": shortener_graph,
    "shortener-timeline.svg": shortener_timeline,
    "one-by-one.svg": one_by_one,
    "two-phases.svg": two_phases,
}
"""What draws each."""
