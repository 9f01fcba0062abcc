"""What a lifespan tells: typed events to who listens, and lines to the log."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args

import anyio
import pytest
from anyio.lowlevel import checkpoint

from lifekit import Registry, Resource, ShutdownError, StartupError, events
from lifekit._core.timeline import Timeline

from .virtual_time import block, run

pytestmark = pytest.mark.anyio
Hear = Callable[[events.Event], object]


class Value:
    """Notes its closing."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def close(self) -> None:
        await checkpoint()
        self.log.append("closed")


def registry_of_two(hear: Hear | None) -> tuple[Registry, list[Value]]:
    """Return a registry of two values, one of which needs the other, and the list they come in."""
    registry = Registry("shop", on_event=hear)
    values: list[Value] = []

    @registry.resource
    def db() -> Value:
        values.append(Value())
        return values[-1]

    @registry.resource(db)
    async def links(db: Value) -> Value:
        await checkpoint()
        values.append(Value())
        return values[-1]

    return registry, values


async def once(registry: Registry) -> None:
    """Run *registry* once."""
    async with registry.lifespan():
        pass


ORDINARY = [
    ("Opening", "db"),
    ("Opened", "db"),
    ("Opening", "links"),
    ("Opened", "links"),
    ("Started", ""),
    ("Stopping", ""),
    ("Closing", "links"),
    ("Closed", "links"),
    ("Closing", "db"),
    ("Closed", "db"),
    ("Stopped", ""),
]


def named(event: events.Event) -> tuple[str, str]:
    """Return an event's name and its resource's."""
    return type(event).__name__, getattr(event, "resource", "")


# -- events ----------------------------------------------------------------------------------------


async def test_an_ordinary_run_tells_of_each_step_in_its_order() -> None:
    heard: list[events.Event] = []
    registry, _ = registry_of_two(heard.append)
    await once(registry)
    assert list(map(named, heard)) == ORDINARY
    assert {event.registry for event in heard} == {"shop"}


def test_each_kind_of_event_carries_what_its_type_says() -> None:
    heard: list[events.Event] = []
    registry = Registry(on_event=heard.append)
    attempts: list[int] = []

    class Stubborn:
        def close(self) -> None:
            raise ZeroDivisionError

        def terminate(self) -> None: ...

    @registry.resource
    async def fine() -> AsyncGenerator[str]:
        await anyio.sleep(1)
        yield "value"
        await anyio.sleep(2)

    @registry.resource(after=[fine], retry=1)
    def stubborn() -> Stubborn:
        attempts.append(1)
        block(1)
        if len(attempts) == 1:
            raise ConnectionRefusedError("not yet")
        return Stubborn()

    @registry.resource(after=[stubborn])
    async def failing() -> None:
        await anyio.sleep(3)
        raise KeyError("no")

    async def main() -> None:
        with pytest.raises(StartupError):
            await once(registry)

    run(main, "trio")
    told = {type(event): event for event in heard}
    of_change = {events.Unavailable, events.Renewed, events.RenewalFailed, events.HeldTooLong}
    of_work = {
        events.Leading,
        events.LeadershipLost,
        events.WorkerStarted,
        events.WorkerFailed,
        events.WorkerEnded,
        events.Crashed,
    }
    of_others = {events.Started, events.StopNoticed}
    assert set(told) == set(get_args(events.Event)) - of_others - of_work - of_change
    by_name = {named(event): event for event in heard}
    assert by_name["Opened", "fine"] == events.Opened("app", "fine", 1.0, "str")
    closed = by_name["Closed", "fine"]
    assert isinstance(closed, events.Closed)
    assert (round(closed.seconds, 3), closed.clean) == (2.0, True)
    assert by_name["Closed", "stubborn"] == events.Closed("app", "stubborn", 0.0, clean=False)
    assert by_name["Terminated", "stubborn"] == events.Terminated("app", "stubborn")
    failed = by_name["OpenFailed", "failing"]
    assert isinstance(failed, events.OpenFailed)
    assert (round(failed.seconds, 3), type(failed.error)) == (3.0, KeyError)
    retrying = by_name["Retrying", "stubborn"]
    assert isinstance(retrying, events.Retrying)
    assert (retrying.attempt, str(retrying.error)) == (1, "not yet")
    assert 0.05 <= retrying.delay <= 0.1
    not_closed = by_name["CloseFailed", "stubborn"]
    assert isinstance(not_closed, events.CloseFailed)
    assert (not_closed.phase, type(not_closed.error)) == ("close", ZeroDivisionError)
    stopped = by_name["Stopped", ""]
    assert isinstance(stopped, events.Stopped)
    assert {span.resource for span in stopped.timeline.spans} == {"stubborn", "fine"}


@pytest.mark.parametrize("kind", get_args(events.Event))
def test_an_event_is_frozen_and_matches_by_what_it_holds(kind: Any) -> None:
    values = {field.name: field.name for field in fields(kind)}
    event = kind(**values)
    assert event == kind(**values)
    for name in values:
        with pytest.raises(FrozenInstanceError):
            setattr(event, name, None)
    with pytest.raises((AttributeError, TypeError)):  # it has slots
        event.more = 1


async def test_the_timelines_told_are_those_of_the_lifespan() -> None:
    heard: dict[type, Timeline] = {}

    def hear(event: events.Event) -> None:
        if isinstance(event, events.Started | events.Stopped):
            heard[type(event)] = event.timeline

    registry, _ = registry_of_two(hear)
    async with registry.lifespan() as lifespan:
        assert heard == {events.Started: lifespan.startup}
    assert heard[events.Stopped] == lifespan.shutdown


async def test_when_an_event_is_told_what_it_tells_of_holds() -> None:
    seen: list[tuple[str, str, bool]] = []
    handles: dict[str, Resource[Value]] = {}

    def hear(event: events.Event) -> None:
        what, name = named(event)
        if name:
            seen.append((what, name, handles[name] in lifespan.live))

    registry, _ = registry_of_two(hear)
    handles.update({handle.name: handle for handle in registry.plan().resources})
    lifespan = registry.lifespan()
    async with lifespan:
        pass
    assert seen == [
        ("Opening", "db", False),
        ("Opened", "db", True),
        ("Opening", "links", False),
        ("Opened", "links", True),
        ("Closing", "links", False),
        ("Closed", "links", False),
        ("Closing", "db", False),
        ("Closed", "db", False),
    ]


async def test_an_included_registry_is_told_of_by_the_one_that_runs() -> None:
    heard: list[events.Event] = []
    unheard: list[events.Event] = []
    package, values = registry_of_two(unheard.append)
    registry = Registry("whole", on_event=heard.append)
    registry.include(package)
    await once(registry)
    assert list(map(named, heard)) == ORDINARY
    assert {event.registry for event in heard} == {"whole"}
    assert unheard == []
    assert len(values) == 2


# -- listeners that fail ---------------------------------------------------------------------------


async def test_a_listener_that_raises_disturbs_nothing_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[events.Event] = []

    def hear(event: events.Event) -> None:
        heard.append(event)
        raise ZeroDivisionError

    registry, values = registry_of_two(hear)
    with caplog.at_level(logging.ERROR, "lifekit"):
        await once(registry)
    assert list(map(named, heard)) == ORDINARY
    assert [value.log for value in values] == [["closed"], ["closed"]]
    assert [record.getMessage() for record in caplog.records] == [
        f"on_event of shop failed at {name}" for name, _ in ORDINARY
    ]
    assert all(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


@pytest.mark.parametrize("interrupt", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ORDINARY, ids="-".join)
async def test_an_interrupt_from_a_listener_is_delivered_after_everything_is_closed(
    interrupt: type[BaseException], moment: tuple[str, str]
) -> None:
    heard: list[tuple[str, str]] = []

    def hear(event: events.Event) -> None:
        heard.append(named(event))
        if named(event) == moment:
            raise interrupt(3)

    registry, values = registry_of_two(hear)
    entered = False
    with pytest.raises(interrupt) as caught:
        async with registry.lifespan():
            entered = True
    assert caught.value.args == (3,)
    # told before everything was open, it keeps the body from running on what is being closed
    assert entered is (ORDINARY.index(moment) > ORDINARY.index(("Started", "")))
    assert heard.count(moment) == 1
    assert [value.log for value in values] == [["closed"]] * len(values)
    assert heard[-1] == ("Stopped", "")


async def test_an_interrupt_from_a_listener_comes_with_the_failures_as_its_context() -> None:
    def hear(event: events.Event) -> None:
        if isinstance(event, events.CloseFailed):
            raise SystemExit(3)

    registry = Registry(on_event=hear)
    log: list[str] = []

    @registry.resource
    async def below() -> AsyncGenerator[None]:
        yield
        log.append("below closed")

    @registry.resource(after=[below])
    async def above() -> AsyncGenerator[None]:
        yield
        raise ZeroDivisionError

    with pytest.raises(SystemExit) as caught:
        await once(registry)
    assert isinstance(caught.value.__context__, ShutdownError)
    assert log == ["below closed"]


# -- the log ---------------------------------------------------------------------------------------


def logged(registry: Registry, log: pytest.LogCaptureFixture, level: int) -> list[tuple[str, str]]:
    """Run *registry* in virtual time, and return the levels and lines that it logs from *level* on."""

    async def main() -> None:
        with suppress(StartupError, ShutdownError):
            await once(registry)

    with log.at_level(level, "lifekit"):
        run(main, "trio")
    assert {record.name for record in log.records} <= {"lifekit"}
    return [(record.levelname, record.getMessage()) for record in log.records]


def registry_for_the_log(*, open_fails: bool, close_fails: bool) -> Registry:
    """Return a registry of three resources that take their time."""
    registry = Registry("shop")
    attempts: list[int] = []

    @registry.resource
    async def db() -> AsyncGenerator[str]:
        await anyio.sleep(1.25)
        yield "100% of it"
        await anyio.sleep(0.5)

    @registry.resource(after=[db], terminate=lambda _: None)
    async def cache() -> AsyncGenerator[int]:
        await anyio.sleep(0.125)
        yield 1
        if close_fails:
            raise ConnectionError("first line\nsecond line")

    @registry.resource(after=[cache], retry=1)
    async def links() -> None:
        await anyio.sleep(2)
        attempts.append(1)
        if open_fails:
            raise ConnectionRefusedError(f"attempt {len(attempts)}")

    @registry.resource(after=[cache])
    async def slow() -> None:
        await anyio.sleep(4.5)

    return registry


def test_each_opening_and_each_closing_is_one_line_with_its_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = registry_for_the_log(open_fails=False, close_fails=False)
    assert logged(registry, caplog, logging.INFO) == [
        ("INFO", "db opened in 1.250 s: str"),
        ("INFO", "cache opened in 0.125 s: int"),
        ("INFO", "links opened in 2.000 s: NoneType"),
        ("INFO", "slow opened in 4.500 s: NoneType"),
        ("INFO", "start of shop in 5.875 s, 4 resources"),
        ("INFO", "links closed in 0.000 s"),
        ("INFO", "slow closed in 0.000 s"),
        ("INFO", "cache closed in 0.000 s"),
        ("INFO", "db closed in 0.500 s"),
        ("INFO", "stop of shop in 0.500 s, 4 resources"),
    ]


def test_failures_are_errors_what_is_tried_again_or_cut_off_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def longest(low: float, high: float) -> float:
        return high

    monkeypatch.setattr("random.uniform", longest)
    registry = registry_for_the_log(open_fails=True, close_fails=True)
    assert logged(registry, caplog, logging.INFO) == [
        ("INFO", "db opened in 1.250 s: str"),
        ("INFO", "cache opened in 0.125 s: int"),
        ("WARNING", "links tried again in 0.10 s after ConnectionRefusedError: attempt 1"),
        ("ERROR", "links failed to open after 4.100 s: ConnectionRefusedError: attempt 2"),
        ("INFO", "slow cancelled after 4.100 s"),
        ("ERROR", "cache failed in close: ConnectionError: first line"),
        ("WARNING", "cache terminated"),
        ("INFO", "db closed in 0.500 s"),
        ("INFO", "stop of shop in 0.500 s, 2 resources"),
    ]


def test_a_quiet_log_still_says_what_failed(caplog: pytest.LogCaptureFixture) -> None:
    registry = registry_for_the_log(open_fails=True, close_fails=True)
    levels = [level for level, _ in logged(registry, caplog, logging.WARNING)]
    assert levels == ["WARNING", "ERROR", "ERROR", "WARNING"]


def test_a_quiet_log_says_nothing_of_an_ordinary_run(caplog: pytest.LogCaptureFixture) -> None:
    registry = registry_for_the_log(open_fails=False, close_fails=False)
    assert logged(registry, caplog, logging.WARNING) == []


def test_beginnings_are_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    registry = registry_for_the_log(open_fails=False, close_fails=False)
    lines = [line for level, line in logged(registry, caplog, logging.DEBUG) if level == "DEBUG"]
    began = [line.partition("(")[0] for line in lines]
    assert began == ["shop: Opening"] * 4 + ["shop: Stopping"] + ["shop: Closing"] * 4
    assert "resource='db'" in lines[0]


async def test_a_listener_does_not_silence_the_log(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[events.Event] = []
    registry, _ = registry_of_two(heard.append)
    with caplog.at_level(logging.INFO, "lifekit"):
        await once(registry)
    assert len(heard) == len(ORDINARY)
    assert [line.split()[0] for line in caplog.messages] == (
        ["db", "links", "start", "links", "db", "stop"]
    )
