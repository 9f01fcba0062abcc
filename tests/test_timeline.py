"""A start and a stop as pictures, and the chain that made them take as long as they did."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import pytest

from lifekit import LifekitError, Registry, Resource, StartupError, events, stopping
from lifekit._core.timeline import Span, Timeline, timeline

from .virtual_time import run

both = pytest.mark.parametrize("backend", ["asyncio", "trio"])

# -- pictures --------------------------------------------------------------------------------------

PICTURE = """\
start of shop in 4.000 s, 5 resources (█ critical path)
  settings │█                                               │ 0.000 s
  db       │████████████                                    │ 1.000 s
  cache    │░░░░░░                                          │ 0.500 s
  links    │            ████████████████████████████████████│ 3.000 s
  late     │                                               ░│ 0.000 s"""


def test_the_picture_has_a_bar_for_each_resource_along_one_axis() -> None:
    spans = (
        Span("settings", 0.0, 0.0, critical=True),
        Span("db", 0.0, 1.0, critical=True),
        Span("cache", 0.0, 0.5),
        Span("links", 1.0, 4.0, critical=True),
        Span("late", 4.0, 4.0),
    )
    whole = Timeline("start of shop in 4.000 s, 5 resources", spans)
    assert str(whole) == PICTURE
    assert whole.seconds == 4.0
    assert whole.critical_path == ("settings", "db", "links")
    assert [span.seconds for span in spans] == [0.0, 1.0, 0.5, 3.0, 0.0]


def test_every_line_of_a_picture_is_as_wide_as_the_others() -> None:
    spans = [Span("n" * (index % 7 + 1), index / 97, index / 50 + 0.001) for index in range(100)]
    lines = str(Timeline("title", tuple(spans))).splitlines()[1:]
    assert len({len(line) for line in lines}) == 1
    assert all("░" in line for line in lines)


def test_a_picture_of_nothing_is_its_title() -> None:
    empty = timeline("start of shop", [], [], [], 7.0)
    assert str(empty) == "start of shop in 0.000 s, 0 resources (█ critical path)"
    assert (empty.seconds, empty.critical_path) == (0.0, ())


def test_a_picture_in_which_no_time_passes_has_bars_all_the_same() -> None:
    whole = timeline("start", ["a", "b"], [(7.0, 7.0), (7.0, 7.0)], [[], []], 7.0)
    assert whole.spans == (Span("a", 0.0, 0.0, critical=True), Span("b", 0.0, 0.0))
    assert [line.count("█") + line.count("░") for line in str(whole).splitlines()[1:]] == [1, 1]


def test_spans_come_in_the_order_they_began_and_then_of_declaration() -> None:
    times = [(3.0, 4.0), (1.0, 2.0), (None, None), (1.0, 3.0), (2.0, None)]
    whole = timeline("start", ["a", "b", "never", "c", "half"], times, [[3], [], [], [], []], 1.0)
    assert whole.title == "start in 3.000 s, 3 resources"
    assert whole.spans == (
        Span("b", 0.0, 1.0),
        Span("c", 0.0, 2.0, critical=True),
        Span("a", 2.0, 3.0, critical=True),
    )


def test_the_critical_path_goes_back_by_what_ended_last_of_what_was_waited_for() -> None:
    names = ["quick", "slow", "slower_but_not_needed", "last"]
    times = [(0.0, 1.0), (0.0, 2.0), (0.0, 3.0), (2.0, 4.0)]
    whole = timeline("start", names, times, [[], [], [], [0, 1]], 0.0)
    assert whole.critical_path == ("slow", "last")


def test_the_critical_path_ends_with_what_ended_last_whenever_it_began() -> None:
    times = [(0.0, 1.0), (1.0, 2.0), (0.5, 3.0)]
    whole = timeline("start", ["first", "second", "long"], times, [[], [0], []], 0.0)
    assert whole.critical_path == ("long",)


# -- of real runs, in virtual time -----------------------------------------------------------------


def diamond(seconds: dict[str, tuple[float, float]]) -> tuple[Registry, dict[str, Resource[Any]]]:
    """Declare base <- (left, right) <- top; each takes its seconds to open and to close."""
    registry = Registry("diamond", start_timeout=1000, close_timeout=1000, grace=1000)
    handles: dict[str, Resource[Any]] = {}

    def declare(name: str, *needs: str) -> None:
        opening, closing = seconds[name]

        async def factory(*_: object) -> AsyncGenerator[str]:
            await anyio.sleep(opening)
            yield name
            await anyio.sleep(closing)

        handles[name] = registry.resource(*(handles[need] for need in needs), name=name)(factory)

    declare("base")
    declare("left", "base")
    declare("right", "base")
    declare("top", "left", "right")
    return registry, handles


def pictures(registry: Registry, backend: str) -> tuple[Timeline, Timeline]:
    """Run *registry* in virtual time, and return its start and its stop."""
    found: list[Timeline] = []

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            await anyio.sleep(1000)
            found.append(lifespan.startup)
        assert lifespan.startup == found[0]
        found.append(lifespan.shutdown)

    run(main, backend)
    start, stop = found
    return start, stop


def rounded(whole: Timeline) -> list[tuple[str, int, int]]:
    """Return names, begins and ends, in whole seconds, ties by name."""
    spans = [(span.resource, round(span.began), round(span.ended)) for span in whole.spans]
    return sorted(spans, key=lambda span: (span[1], span[0]))


@both
def test_the_start_and_the_stop_of_a_diamond_each_have_a_critical_path(backend: str) -> None:
    registry, _ = diamond({"base": (10, 40), "left": (20, 30), "right": (50, 10), "top": (10, 20)})
    start, stop = pictures(registry, backend)
    assert rounded(start) == [("base", 0, 10), ("left", 10, 30), ("right", 10, 60), ("top", 60, 70)]
    assert start.critical_path == ("base", "right", "top")
    assert rounded(stop) == [("top", 0, 20), ("left", 20, 50), ("right", 20, 30), ("base", 50, 90)]
    assert stop.critical_path == ("top", "left", "base")
    assert (round(start.seconds), round(stop.seconds)) == (70, 90)


def test_the_pictures_of_a_diamond_look_like_this() -> None:
    registry, _ = diamond({"base": (10, 40), "left": (20, 30), "right": (50, 10), "top": (10, 20)})
    start, stop = pictures(registry, "trio")
    assert str(start) == (
        """\
start of diamond in 70.000 s, 4 resources (█ critical path)
  base  │███████                                         │ 10.000 s
  left  │       ░░░░░░░░░░░░░░                           │ 20.000 s
  right │       ██████████████████████████████████       │ 50.000 s
  top   │                                         ███████│ 10.000 s"""
    )
    assert str(stop) == (
        """\
stop of diamond in 90.000 s, 4 resources (█ critical path)
  top   │███████████                                     │ 20.000 s
  right │           ░░░░░                                │ 10.000 s
  left  │           ████████████████                     │ 30.000 s
  base  │                           █████████████████████│ 40.000 s"""
    )


@both
def test_workers_are_in_both_pictures_and_make_no_start_longer(backend: str) -> None:
    started: list[events.Event] = []
    registry = Registry("working", close_timeout=1000, grace=1000, on_event=started.append)

    @registry.worker(drain=100)
    async def early() -> None:
        await stopping().wait()
        await anyio.sleep(30)

    @registry.resource
    async def db() -> AsyncGenerator[str]:
        await anyio.sleep(10)
        yield "db"
        await anyio.sleep(20)

    @registry.worker(db)
    async def late(_: str) -> None: ...

    start, stop = pictures(registry, backend)
    assert rounded(start) == [("db", 0, 10), ("early", 10, 10), ("late", 10, 10)]
    assert start.critical_path == ("db",)
    assert [event.timeline for event in started if isinstance(event, events.Started)] == [start]
    assert ("early", 0, 30) in rounded(stop)


@both
def test_a_failed_start_has_its_pictures_too(backend: str) -> None:
    registry, handles = diamond({"base": (10, 4), "left": (5, 1), "right": (1, 2), "top": (1, 1)})

    @registry.resource(handles["right"])
    async def failing(_: str) -> None:
        await anyio.sleep(2)
        raise ZeroDivisionError

    async def main() -> None:
        lifespan = registry.lifespan()
        with pytest.raises(StartupError):
            await lifespan.__aenter__()
        # left was cancelled when failing failed, and top never began
        assert rounded(lifespan.startup) == (
            [("base", 0, 10), ("left", 10, 13), ("right", 10, 11), ("failing", 11, 13)]
        )
        assert rounded(lifespan.shutdown) == [("right", 0, 2), ("base", 2, 6)]
        assert lifespan.shutdown.critical_path == ("right", "base")

    run(main, backend)


@pytest.mark.anyio
async def test_what_is_closed_before_the_stop_that_it_causes_is_in_the_picture() -> None:
    class Half:
        async def __aenter__(self) -> None:
            raise ZeroDivisionError

        async def __aexit__(self, *_: object) -> None: ...

        def terminate(self) -> None:
            time.sleep(0.002)  # and the lifespan's owner does not hear of it before

    registry = Registry()
    registry.resource(name="half")(Half)
    lifespan = registry.lifespan()
    with pytest.raises(StartupError):
        await lifespan.__aenter__()
    (half,) = lifespan.shutdown.spans
    assert half.began == 0
    assert half.seconds >= 0.0019  # as the loop's clock has it
    assert len(str(lifespan.shutdown).splitlines()[1]) < 80


def test_a_lifespan_that_was_not_entered_has_no_pictures_yet() -> None:
    lifespan = Registry().lifespan()
    with pytest.raises(LifekitError, match=r"test_timeline\.py.* was not entered yet"):
        lifespan.startup  # noqa: B018
    with pytest.raises(LifekitError, match="was not entered yet"):
        lifespan.shutdown  # noqa: B018
